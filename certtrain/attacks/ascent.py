"""Gradient ascent with a fixed step size from a chosen start: the attack of most adversarial training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..bounds import NormBall, PerturbationSet
from ..errors import check
from ..step import Batch, Step
from .base import Attack, AttackResult, gradient_of
from .objective import CrossEntropy, Objective

Start = Literal["zero", "uniform", "normal", "corners"]
STARTS = ("zero", "uniform", "normal", "corners")


@dataclass(frozen=True)
class Ascent(Attack[NormBall]):
    """x' ← Π(x' + step_size · epsilon · direction of the gradient), ``steps`` times; the last point is returned.

    The direction is the ball's own: the gradient's sign in an l_inf ball, the gradient over its norm in an l2 ball.
    FGSM is one step from zero of size 1 (arXiv 1412.6572), FGSM-RS one of 1.25 from a uniform start (arXiv 2001.03994),
    N-FGSM one of 1 from a start of scale 2 without projection (arXiv 2202.01181), PGD-10 ten of 1/4 (arXiv 1706.06083).

    Its trace holds ``start`` (B, *shape), ``logits`` (B, K) and ``gradient`` (B, *shape) there, ``correct`` (B,), the
    number of points before a step that are classified correctly, and, where ``record`` asks for it, ``iterate``
    (B, *shape).

    Args:
        steps: number of gradient steps.
        step_size: in epsilons.
        start: the image (``zero``), a ``uniform`` point of the ball, the image plus ``normal`` noise, or a random
            corner (``corners``; of an l2 ball a random point of its sphere).
        start_scale: size of the start: a multiple of epsilon, or the standard deviation of ``normal`` noise in pixels.
        projected: whether every point stays in the ball; else in the images' box and in the ball of radius
            (start_scale + steps · step_size) · epsilon.
        objective: the objective to maximise; null for the loss' own, the cross-entropy for most.
        record: number of steps after which the point is recorded as ``iterate``; 0 for none.
    """

    needs: ClassVar[type[PerturbationSet]] = NormBall
    steps: int = 10
    step_size: float = 0.25
    start: Start = "uniform"
    start_scale: float = 1.0
    projected: bool = True
    objective: Objective | None = None
    record: int = 0

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, "a whole number >= 1")
        check(self.step_size > 0, "step_size", self.step_size, "a number > 0, in epsilons")
        check(self.start in STARTS, "start", self.start, ", ".join(STARTS))
        check(self.start_scale >= 0, "start_scale", self.start_scale, "a number >= 0")
        bounded = self.projected or self.start != "normal"
        check(bounded, "start", self.start, "zero, uniform or corners where projected is false")
        check(0 <= self.record <= self.steps, "record", self.record, f"0 to {self.steps}, a number of steps")

    def toward(self, objective: Objective) -> Ascent:
        return self if self.objective is not None else replace(self, objective=objective)

    def allowed(self, ball: PerturbationSet) -> PerturbationSet:
        if self.projected:
            return ball
        return ball.scaled((self.start_scale if self.start != "zero" else 0.0) + self.steps * self.step_size)

    def propose(self, model: nn.Module, batch: Batch, ball: NormBall, step: Step) -> AttackResult:
        maximised = self.maximised(model, batch, step)
        points = self.begin(batch, ball, step)
        trace, correct = {"start": points}, torch.zeros_like(batch.labels)
        for number in range(1, self.steps + 1):
            logits, gradient = gradient_of(model, points, maximised)
            correct += logits.argmax(1) == batch.labels
            trace.setdefault("logits", logits)
            trace.setdefault("gradient", gradient)
            points = self.taken(points, self.move(batch.images, points, gradient, ball), number - correct, step)
            if number == self.record:
                trace["iterate"] = points
        return AttackResult(points, {**trace, "correct": correct})

    def maximised(self, model: nn.Module, batch: Batch, step: Step) -> Callable[[Tensor], Tensor]:
        """The function of the logits (B, K) whose sum over the batch is maximised."""
        objective = self.objective or CrossEntropy()
        reference = objective.reference(model, batch)
        return lambda logits: objective(logits, reference)

    def taken(self, points: Tensor, moved: Tensor, wrong: Tensor, step: Step) -> Tensor:
        """The points to continue from, where ``wrong`` (B,) is the number of misclassified points so far."""
        return moved

    def begin(self, batch: Batch, ball: NormBall, step: Step) -> Tensor:
        """The first point, an image in [0, 1]."""
        images = batch.images
        match self.start:
            case "zero":
                return images
            case "uniform":
                wide = ball.scaled(self.start_scale)
                points = wide.project(images, (images + wide.sample(images, step.noise, "start")).clamp(0, 1))
            case "normal":
                points = images + self.start_scale * step.noise.normal(images.shape[1:], "start", images.dtype)
            case _:
                corner = ball.direction(step.noise.normal(images.shape[1:], "start", images.dtype))
                points = images + self.start_scale * ball.radius(images) * corner
        return self.bounded(images, points, ball)

    def move(self, images: Tensor, points: Tensor, gradient: Tensor, ball: NormBall) -> Tensor:
        """One step from ``points`` along the gradient there."""
        return self.bounded(images, points + self.step_size * ball.radius(images) * ball.direction(gradient), ball)

    def bounded(self, images: Tensor, points: Tensor, ball: NormBall) -> Tensor:
        """Back into the ball, or into [0, 1] alone."""
        return ball.project(images, points.clamp(0, 1)) if self.projected else points.clamp(0, 1)
