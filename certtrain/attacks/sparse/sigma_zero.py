"""σ-zero: minimum-norm attack on few pixels (Cinà et al., ICLR 2025, arXiv 2402.01879)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import devices
from ...bounds import PerturbationSet, SparseBall
from ...errors import check
from ...step import Batch, Step
from ..base import Attack, AttackResult, gradient_of
from ..objective import lead
from .best_so_far import STRETCH


@dataclass(frozen=True)
class SigmaZero(Attack[SparseBall]):
    """Minimum norm: gradient descent, from no change at all, of how far the label leads plus a smooth count of the
    units that differ.

    The count of a change d is the mean over units of |d_u|²/(|d_u|² + sigma), and the lead counts as 0 where it is
    negative. Each gradient is divided by its largest entry; Adam takes the step, at a rate that falls along half a
    cosine to a tenth; the change is cut to valid images; and units in which nothing changes by tau or more return to
    the image. tau, one for each image, falls where the image was still right and rises where it was not.

    The result is the misclassified point at which the fewest units differ. k takes no part in the search: an image is
    broken where they are at most k, and else the frame cuts the point to k units, with no promise. Clean errors stay
    as they are, and so do images that were never misclassified. Its trace holds ``changed`` (B,) int64, the least
    number of units at which an image was found misclassified, also above k; and ``found_at`` (B,) int64, after how
    many steps it was first found so with at most k. Both are 0 for a clean error and -1 for never.

    Args:
        steps: number of updates; 100 and 1000 are usual.
        lr: the first learning rate.
        sigma: smoothing of the count, which is exact in the limit 0.
        threshold: the first tau, in pixel units of [0, 1].
        threshold_rate: how far tau moves in a step, times the learning rate. tau stays in [0, 1].
    """

    needs: ClassVar[type[PerturbationSet]] = SparseBall

    steps: int = 100
    lr: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    threshold_rate: float = 0.01

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, "a whole number >= 1")
        check(0 < self.lr < float("inf"), "lr", self.lr, "a number > 0")
        check(0 < self.sigma < float("inf"), "sigma", self.sigma, "a number > 0")
        check(0 <= self.threshold <= 1, "threshold", self.threshold, "a number in [0, 1], in pixel units")
        check(0 <= self.threshold_rate < float("inf"), "threshold_rate", self.threshold_rate, "a number >= 0")

    def propose(self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step) -> AttackResult:
        shape, descent = batch.images.shape[1:], _Descent.starting(ball.grouped(batch.images), self.threshold)
        best, allowed = batch.images.clone(), torch.as_tensor(ball.counts(batch.images), device=batch.images.device)
        allowed = allowed.expand(len(batch))
        changed, found_at = torch.full_like(descent.rows, -1), torch.full_like(descent.rows, -1)
        alone = self.attack_mode in ("eval", "clean")  # else batch norm has to see the whole batch
        stretch = STRETCH if devices.reading_waits(batch.images) else 1
        for number in range(self.steps + 1):
            if alone and number % stretch == 0:
                known = changed[descent.rows]
                improvable = (known < 0) | (known > 1)
                if not bool(improvable.all()):
                    descent = descent.take(improvable)
                if not len(descent.rows):
                    break
            rows, grouped = descent.rows, descent.points()
            points, labels = ball.ungrouped(grouped, shape), batch.labels[rows]
            logits, gradient = gradient_of(model, points, lambda z, labels=labels: lead(z, labels).clamp(min=0))
            wrong = ~(lead(logits, labels) > 0)
            counts = (grouped != descent.center).any(1).sum(1)
            fewer = wrong & ((changed[rows] < 0) | (counts < changed[rows]))
            best[rows] = torch.where(fewer.reshape(-1, *[1] * len(shape)), points, best[rows])
            changed[rows] = torch.where(fewer, counts, changed[rows])
            first = wrong & (counts <= allowed[rows]) & (found_at[rows] < 0)
            found_at[rows] = torch.where(first, number, found_at[rows])
            if number < self.steps:
                descent = self.moved(descent, ball.grouped(gradient), wrong, number)
        return AttackResult(best, {"changed": changed, "found_at": found_at})

    def moved(self, at: _Descent, gradient: Tensor, wrong: Tensor, number: int) -> _Descent:
        """Take one step along the lead's ``gradient`` (R, M, N); ``wrong`` (R,) bool marks misclassified images."""
        size = at.change.square().sum(1, keepdim=True)
        count = 2 * self.sigma * at.change / (size + self.sigma).square() / size.shape[2]
        gradient = torch.where(gradient.isfinite(), gradient, 0) + count
        gradient = gradient / gradient.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
        rate = self.lr * (0.55 + 0.45 * math.cos(math.pi * number / self.steps))
        first, second = 0.9 * at.first + 0.1 * gradient, 0.999 * at.second + 0.001 * gradient.square()
        scale = (second / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8
        change = at.change - rate * (first / (1 - 0.9 ** (number + 1))) / scale
        change = torch.minimum(torch.maximum(change, -at.center), 1 - at.center)
        tau = (at.tau + self.threshold_rate * rate * torch.where(wrong, 1, -1)).clamp(0, 1)
        small = change.abs().amax(1, keepdim=True) < tau[:, None, None]
        return replace(at, change=torch.where(small, 0, change), first=first, second=second, tau=tau)


@dataclass(frozen=True)
class _Descent:
    """The state of the descent on R images of a batch, grouped (R, M, N).

    Args:
        rows: (R,) int64, their numbers in the batch.
        center: the clean images.
        change: from the clean images.
        first, second: Adam's averages of the gradient and of its square.
        tau: (R,) the threshold.
    """

    rows: Tensor
    center: Tensor
    change: Tensor
    first: Tensor
    second: Tensor
    tau: Tensor

    @classmethod
    def starting(cls, center: Tensor, threshold: float) -> _Descent:
        rows, nothing = torch.arange(len(center), device=center.device), torch.zeros_like(center)
        return cls(rows, center, nothing, nothing, nothing, center.new_full((len(center),), threshold))

    def take(self, chosen: Tensor) -> _Descent:
        """Select some of the images by an (R,) bool mask."""
        return replace(self, **{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def points(self) -> Tensor:
        return (self.center + self.change).clamp(0, 1)
