"""Projected gradient descent with sign steps (Madry et al., arXiv 1706.06083), and FGSM as its one-step case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds import NormBall, PerturbationSet
from ..errors import check
from ..step import Batch, Step
from .base import Attack, AttackResult, gradient_of


@dataclass(frozen=True)
class Pgd(Attack[NormBall]):
    """Sign-gradient ascent of a loss inside the ball.

    One step of size 2 or more from anywhere lands on a face of the box in every coordinate whose gradient
    is not 0. With several steps or restarts the best point visited is returned, the start included; with one
    step of one restart, the last (as the published recipes of certified training do, arXiv 2305.13991).

    Args:
        steps: number of gradient steps.
        step_size: relative to the half width of the clipped box, pixel by pixel.
        milestones, decay: the step size is multiplied by ``decay`` after each of these numbers of steps.
        random_start: start uniformly inside the box instead of at the image.
        restarts: independent runs; the best one counts.
        diversified: steps before each run, of a half width each, along a random direction of the logits: starts that
            differ in the network's output (output diversified initialisation, arXiv 2003.06878).
        objective: ``cross_entropy``, or ``margin`` = max over j of z_j - z_y, which is >= 0 exactly where the
            image is misclassified or tied, so that the best point keeps every success.
    """

    needs: ClassVar[type[PerturbationSet]] = NormBall
    steps: int = 1
    step_size: float = 10.0
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    random_start: bool = True
    restarts: int = 1
    diversified: int = 0
    objective: Literal["cross_entropy", "margin"] = "cross_entropy"

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, "a whole number >= 1")
        check(self.step_size > 0, "step_size", self.step_size, "a number > 0, relative to the box's half width")
        check(all(m >= 1 for m in self.milestones), "milestones", self.milestones, "a list of steps >= 1")
        check(0 < self.decay <= 1, "decay", self.decay, "a number in (0, 1]")
        check(self.restarts >= 1, "restarts", self.restarts, "a whole number >= 1")
        check(self.diversified >= 0, "diversified", self.diversified, "a whole number >= 0")

    def propose(self, model: nn.Module, batch: Batch, ball: NormBall, step: Step) -> AttackResult:
        hull = ball.hull(batch.images)
        keep_best = self.steps > 1 or self.restarts > 1
        best, best_value = batch.images, torch.full_like(batch.labels, -torch.inf, dtype=batch.images.dtype)
        points = batch.images
        for restart in range(self.restarts):
            points = batch.images
            if self.random_start:
                share = step.noise.uniform(points.shape[1:], f"start/{restart}", points.dtype)
                points = ball.project(batch.images, hull.lower + share * 2 * hull.radius)
            for _ in range(self.diversified):
                _, gradient = gradient_of(model, points, lambda z, key=f"direction/{restart}": _along(step, key, z))
                points = ball.project(batch.images, points + hull.radius * gradient.sign())
            for number in range(self.steps):
                size = self.step_size * self.decay ** sum(number >= milestone for milestone in self.milestones)
                logits, gradient = gradient_of(model, points, lambda z: self._objective(z, batch.labels))
                if keep_best:
                    best, best_value = _better(best, best_value, points, self._objective(logits, batch.labels))
                points = ball.project(batch.images, points + size * hull.radius * gradient.sign())
            if keep_best:
                with torch.no_grad():
                    values = self._objective(model(points), batch.labels)
                best, best_value = _better(best, best_value, points, values)
        return AttackResult(best if keep_best else points)

    def _objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.objective == "cross_entropy":
            return F.cross_entropy(logits, labels, reduction="none")
        own = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        return (others - own).amax(1)


def _along(step: Step, key: str, logits: Tensor) -> Tensor:
    """The logits' component (B,) along a random direction in [-1, 1]^K, the same at every call."""
    return ((2 * step.noise.uniform(logits.shape[1:], key, logits.dtype) - 1) * logits).sum(1)


def _better(best: Tensor, best_value: Tensor, points: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    improved = values > best_value
    rows = improved.reshape(-1, *[1] * (points.ndim - 1))
    return torch.where(rows, points, best), torch.where(improved, values, best_value)
