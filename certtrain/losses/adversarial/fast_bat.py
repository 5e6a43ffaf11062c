from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...attacks import Attack, AttackResult, CrossEntropy, Linearisation, Objective, buffers_kept
from ...bounds import NormBall, PerturbationSet
from ...config import added
from ...errors import InputError, check
from ...step import Batch, Step
from .base import AdversarialTraining, Passes


@dataclass(frozen=True)
class FastBat(AdversarialTraining):
    """Fast-BAT: bi-level training, with the exact gradient through the attack's last step (arXiv 2112.12376).

    The attack minimises a linearised loss with a quadratic term over the box: δ* = Π(z + step_size · ∇_δ A(z)), with A
    the sum of the lower level's objective over the batch. Its derivative with respect to the weights is that of the
    step where it ends inside the box and 0 elsewhere, so the loss' gradient is ∂CE(δ*) + implicit · ∇_weights
    <∇_δ A(z), inside · ∇_δ CE(δ*)>: one backward pass through the gradient at z, and no Hessian.

    Defined in l_inf balls. The form in sparse sets is our own reading: the source names Fast-BAT over its l0 attack
    without details (Zhong et al., NeurIPS 2025). There the quadratic's minimiser is the nearest point of the set, which
    selects k pixels; the derivative passes where a pixel is selected and the entry ends inside [0, 1], with the
    selection held fixed.

    Args:
        attack: finds the point of linearisation z; in a sparse set ``{type: SparsePgd, steps: 1, alpha: 1, beta: 1,
            patience: null, keep: last}``.
        step_size: size of the last step, in pixel units: 5000/255 as released up to epsilon 8/255, 2000/255 above.
        implicit: weight of the implicit gradient, 1 / lambda: 0.1 as released, 0 for none, null for ``step_size``,
            which makes it the exact derivative.
        sign: take the sign of the gradient in the last step, whose derivative is 0, with step size ``sign_size``; in
            l_inf balls only.
        sign_size: step size in epsilons.
        lower: what the lower level maximises, in the attack, in the last step and in the implicit gradient: null for
            the cross-entropy, as published; any other objective, such as a margin, a divergence from the clean
            prediction, which is held fixed, or one of your own. An attack with an objective keeps that for itself.
    """

    attack: Attack | None = Linearisation(attack_mode="train")
    step_size: float = 5000 / 255
    implicit: float | None = 0.1
    sign: bool = False
    sign_size: float = 1.25
    lower: Objective | None = added(None)

    def __post_init__(self) -> None:
        check(self.step_size > 0, "step_size", self.step_size, "a number > 0")
        check(self.implicit is None or self.implicit >= 0, "implicit", self.implicit, "a number >= 0, or null")
        check(self.sign_size > 0, "sign_size", self.sign_size, "a number > 0, in epsilons")

    @property
    def second_derivatives(self) -> bool:
        return True

    @property
    def objective(self) -> Objective:
        return CrossEntropy() if self.lower is None else self.lower

    def check_ball(self, ball: PerturbationSet) -> None:
        if not ball.projects_by_entry:
            raise InputError(f"loss.type FastBat: found {ball.kind} for perturbation; accepted: LinfBall, SparseBall")
        super().check_ball(ball)
        if self.sign and not NormBall.matches(ball):
            raise InputError(f"loss.sign: found true for a {ball.kind}, whose epsilon is no size; accepted: false")

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        point = found.images.detach().requires_grad_()
        implicit = not self.sign and self.implicit != 0
        objective = self.objective
        with nullcontext() if self.lower is None else buffers_kept(model):  # a divergence passes the clean images
            reference = objective.reference(model, batch)
        with torch.set_grad_enabled(True):
            ascended = objective(model(point), reference).sum()
            (gradient,) = torch.autograd.grad(ascended, point, create_graph=implicit)
        with torch.no_grad():
            change = self.step_size * gradient
            if self.sign:
                change = self.sign_size * NormBall.of(step.ball).radius(gradient) * gradient.sign()
            target = found.images + change
            images = step.ball.project(batch.images, target)
            inside = step.ball.follows(batch.images, images, target)
        if implicit:  # images as they are, with the derivative of the step where it ends inside the box
            size = self.step_size if self.implicit is None else self.implicit
            images = images + size * inside * (gradient - gradient.detach())
        return super().passes(model, batch, step, replace(found, images=images), clean)
