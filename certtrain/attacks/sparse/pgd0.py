"""PGD on the l0 set: gradient steps and exact projection (Croce and Hein, arXiv 1909.05040)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...bounds import PerturbationSet, SparseBall
from ...errors import check
from ...step import Batch, Step
from ..base import Attack, AttackResult, gradient_of
from ..objective import CrossEntropy, Objective
from .best_so_far import BestSoFar


@dataclass(frozen=True)
class Pgd0(Attack[SparseBall]):
    """x' moves by ``step_size`` along the gradient, which is divided by its l1 norm, and back to the nearest point of
    the ball: a weak baseline beside sPGD.

    The result is the first misclassified point, else that with the largest objective, the image included; images
    misclassified from the start are unchanged. The trace holds ``found_at`` (B,) int64: the number of steps, those of
    earlier restarts included, after which an image was first misclassified; 0 for the first start or a clean error, -1
    for never.

    Args:
        steps: of each restart.
        step_size: the l1 length of a step in pixel units of [0, 1]. The published one fits 3 x 32 x 32 numbers; on
            few numbers it moves every pixel that the gradient selects to a face of the box.
        restarts: number of runs, each from a random point of the ball.
        objective: the objective to maximise; null for the loss' own, the cross-entropy for most.
    """

    needs: ClassVar[type[PerturbationSet]] = SparseBall

    steps: int = 100
    step_size: float = 120000 / 255
    restarts: int = 5
    objective: Objective | None = None

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, "a whole number >= 1")
        check(0 < self.step_size < float("inf"), "step_size", self.step_size, "a number > 0, in pixel units of [0, 1]")
        check(self.restarts >= 1, "restarts", self.restarts, "a whole number >= 1")

    def toward(self, objective: Objective) -> Pgd0:
        return self if self.objective is not None else replace(self, objective=objective)

    def propose(self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step) -> AttackResult:
        objective = self.objective or CrossEntropy()
        reference = objective.reference(model, batch)
        best = BestSoFar.clean(model, batch, objective, reference)
        for restart in range(self.restarts):
            rows, done = torch.arange(len(batch), device=batch.images.device), restart * self.steps
            change = ball.sample(batch.images, step.noise, f"start/{restart}")
            points = ball.project(batch.images, batch.images + change)
            for number in range(self.steps + 1):
                left = best.open(rows, number, self.attack_mode)
                if left is not None:
                    rows, points = rows[left], points[left]
                if not len(rows):
                    break
                logits, gradient = gradient_of(model, points, lambda z, rows=rows: objective(z, reference[rows]))
                best = best.after(rows, points, logits, batch.labels, objective(logits, reference[rows]), done + number)
                if number < self.steps:
                    moved = points + self.step_size * _direction(gradient)
                    points = ball.take(rows).project(batch.images[rows], moved)
        return AttackResult(best.images, {"found_at": best.found_at})


def _direction(gradient: Tensor) -> Tensor:
    """Each image's gradient over its l1 norm; 0 where it is 0, infinite or NaN."""
    flat = torch.where(gradient.isfinite(), gradient, 0).flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)  # so that no sum overflows
    return (flat / flat.abs().sum(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)).reshape(gradient.shape)
