"""sPGD: gradient ascent on magnitudes and on one logit for each pixel (Zhong et al., arXiv 2405.05075)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import devices, kernels
from ...bounds import PerturbationSet, SparseBall
from ...errors import check
from ...noise import Noise, key_of
from ...step import Batch, Step
from ..base import Attack, AttackResult, gradient_of
from ..objective import CrossEntropy, Objective, lead
from .best_so_far import STRETCH

Variant = Literal["unprojected", "projected", "coin"]


@dataclass(frozen=True)
class SparsePgd(Attack[SparseBall]):
    """x' = x + p ⊙ M, with magnitudes p and the mask M of the k pixels (or other units of the ball) with the largest
    logits m; each step moves both along the gradient.

    m moves by beta sqrt(N) along the normalised gradient of the mask, p by alpha along the gradient's sign, both cut to
    valid images; ``kernels.spgd_step`` is one such update. Starts are random: p uniform in [-1, 1], m normal.

    Its trace holds ``found_at`` (B,) int64: after how many steps an image was first misclassified, 0 for the start or a
    clean error, -1 for never; where the ``last`` point is kept instead ``start`` (B, *shape), and ``logits`` (B, K) and
    ``gradient`` (B, *shape) there.

    Args:
        steps: number of updates. One-step training takes 1, multi-step training 20, evaluations 300 to 10000.
        alpha, beta: step sizes of p and m: 1/4 each, in one-step training 1.
        variant: ``projected`` moves only the selected pixels' p (sPGD_p), ``unprojected`` all (sPGD_u); ``coin`` is
            either, by one toss for each batch.
        patience: m is drawn anew where M has stayed the same for so many steps in a row; null for never.
        keep: ``best``: the first point that is misclassified, else that with the largest objective, the image and the
            start included; clean errors stay as they are. ``last``: the point after the last step, of every image.
        objective: the objective to maximise; null for the loss' own, the cross-entropy for most.
    """

    needs: ClassVar[type[PerturbationSet]] = SparseBall

    steps: int = 20
    alpha: float = 0.25
    beta: float = 0.25
    variant: Variant = "unprojected"
    patience: int | None = 3
    keep: Literal["best", "last"] = "best"
    objective: Objective | None = None

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, "a whole number >= 1")
        check(0 < self.alpha < float("inf"), "alpha", self.alpha, "a number > 0")
        check(0 < self.beta < float("inf"), "beta", self.beta, "a number > 0")
        check(self.patience is None or self.patience >= 1, "patience", self.patience, "a whole number >= 1, or null")

    def toward(self, objective: Objective) -> SparsePgd:
        return self if self.objective is not None else replace(self, objective=objective)

    def propose(self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step) -> AttackResult:
        walk = self.begin(batch, ball, step)
        found = self._last if self.keep == "last" else self._best
        return found(model, batch, ball, step, walk, self.is_projected(step))

    def is_projected(self, step: Step) -> bool:
        """Whether this batch's steps move only the selected pixels."""
        if self.variant == "coin":
            return bool(key_of(step.noise.key, "variant") & 1)
        return self.variant == "projected"

    def begin(self, batch: Batch, ball: SparseBall, step: Step) -> Walk:
        """The start of the walk."""
        center = ball.grouped(batch.images)
        p = 2 * step.noise.uniform(center.shape[1:], "magnitudes", center.dtype) - 1
        p = torch.minimum(torch.maximum(p, -center), 1 - center)
        m = step.noise.normal(center.shape[2:], "logits", center.dtype)
        return Walk.starting(center, p, m, ball.counts(center), step.noise)

    def _last(
        self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step, walk: Walk, projected: bool
    ) -> AttackResult:
        shape, maximised, trace = batch.images.shape[1:], self.maximised(model, batch, step), {}
        for number in range(self.steps):
            points = ball.ungrouped(walk.points, shape)
            logits, gradient = gradient_of(model, points, maximised)
            if not number:
                trace = {"start": points, "logits": logits, "gradient": gradient}
            walk = self.moved(walk, ball.grouped(gradient), projected, number)
        self.ended(walk, batch, step)
        return AttackResult(ball.ungrouped(walk.points, shape), trace)

    def _best(
        self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step, walk: Walk, projected: bool
    ) -> AttackResult:
        shape, objective = batch.images.shape[1:], self.objective or CrossEntropy()
        reference = objective.reference(model, batch)
        with torch.no_grad():
            logits = model(batch.images)
        best = BestPoint.starting(walk.center, batch.labels, reference, logits, objective(logits, reference))
        images, found_at = torch.empty_like(walk.center), best.found_at.clone()
        alone = self.attack_mode in ("eval", "clean")  # else batch norm has to see the whole batch
        stretch = STRETCH if devices.reading_waits(images) else 1
        for number in range(self.steps + 1):
            if alone and number % stretch == 0:
                left = best.found_at < 0
                if not bool(left.all()):
                    gone = walk.rows[~left]
                    images[gone], found_at[gone] = best.points[~left], best.found_at[~left]
                    walk, best = walk.take(left), best.take(left)
                if not len(walk.rows):
                    break
            points, held = ball.ungrouped(walk.points, shape), best.reference
            gradient = points
            if number < self.steps:
                logits, gradient = gradient_of(model, points, lambda z, held=held: objective(z, held))
            else:
                with torch.no_grad():
                    logits = model(points)
            best = best.after(number, walk.points, logits, objective(logits, held))
            if number < self.steps:
                walk = self.moved(walk, ball.grouped(gradient), projected, number)
        images[walk.rows], found_at[walk.rows] = best.points, best.found_at
        return AttackResult(ball.ungrouped(images, shape), {"found_at": found_at})

    def maximised(self, model: nn.Module, batch: Batch, step: Step) -> Callable[[Tensor], Tensor]:
        """The function of the logits (B, K) whose sum is maximised, where the last point is kept."""
        objective = self.objective or CrossEntropy()
        reference = objective.reference(model, batch)
        return lambda logits: objective(logits, reference)

    def moved(self, walk: Walk, gradient: Tensor, projected: bool, number: int) -> Walk:
        """Take one step, after ``number`` others; draw new logits for images whose mask has not changed for too
        long."""
        p, m, mask, points, changed = kernels.spgd_step(
            gradient, walk.p, walk.m, walk.center, walk.mask, walk.k,
            alpha=self.alpha, beta=self.beta, projected=projected,
        )  # fmt: skip
        walk = replace(walk, p=p, m=m, mask=mask, points=points)
        if self.patience is None:
            return walk
        still = torch.where(changed, 0, walk.still + 1)
        stuck = still >= self.patience
        walk = replace(walk, still=torch.where(stuck, 0, still))
        if number + 1 < self.patience:
            return walk
        if devices.reading_waits(stuck):  # to draw for all is cheaper than to ask for whom
            fresh = walk.noise.normal(m.shape[1:], f"logits/{number}", m.dtype)
            m = torch.where(stuck[:, None], fresh, m)
            points, mask = kernels.sparse_apply(walk.center, p, m, walk.k)
            return replace(walk, m=m, mask=mask, points=points)
        index = stuck.nonzero().flatten()
        if len(index):  # what the step returned belongs to this walk alone
            noise, k = _of(walk.noise, index), walk.k[index] if isinstance(walk.k, Tensor) else walk.k
            m[index] = fresh = noise.normal(m.shape[1:], f"logits/{number}", m.dtype)
            points[index], mask[index] = kernels.sparse_apply(walk.center[index], p[index], fresh, k)
        return walk

    def ended(self, walk: Walk, batch: Batch, step: Step) -> None:
        """Called with the final state of the walk of a whole batch."""


@dataclass(frozen=True)
class Walk:
    """The state of the attack on some images of a batch, grouped (B, M, N).

    Args:
        rows: (B,) int64, their numbers in the batch.
        center: the images.
        p: (B, M, N) magnitudes.
        m: (B, N) logits.
        mask: (B, N) uint8.
        points: (B, M, N).
        still: (B,) steps since the mask last changed.
        k: of each image, or of all.
        noise: of these images.
    """

    rows: Tensor
    center: Tensor
    p: Tensor
    m: Tensor
    mask: Tensor
    points: Tensor
    still: Tensor
    k: int | Tensor
    noise: Noise

    @classmethod
    def starting(cls, center: Tensor, p: Tensor, m: Tensor, k: int | Tensor, noise: Noise) -> Walk:
        rows = torch.arange(len(center), device=center.device)
        points, mask = kernels.sparse_apply(center, p, m, k)
        return cls(rows, center, p, m, mask, points, torch.zeros_like(rows), k, noise)

    def take(self, chosen: Tensor) -> Walk:
        """Select some of the images by a (B,) bool mask."""
        index = chosen.nonzero().flatten()
        return replace(self, **_picked(self, index), noise=_of(self.noise, index))


@dataclass(frozen=True)
class BestPoint:
    """The best points of a walk so far; images in the walk's order.

    Args:
        points: (B, M, N), the best.
        values: (B,), the objective there.
        found_at: (B,), as in the trace.
        labels, reference: of the images, to judge logits by.
    """

    points: Tensor
    values: Tensor
    found_at: Tensor
    labels: Tensor
    reference: Tensor

    @classmethod
    def starting(cls, center: Tensor, labels: Tensor, reference: Tensor, logits: Tensor, values: Tensor) -> BestPoint:
        return cls(center.clone(), values, torch.where(lead(logits, labels) > 0, -1, 0), labels, reference)

    def after(self, number: int, points: Tensor, logits: Tensor, values: Tensor) -> BestPoint:
        """Update with the points after ``number`` steps. The result reuses this object's points."""
        wrong = ~(lead(logits, self.labels) > 0)
        left = self.found_at < 0
        better = left & (wrong | (values >= self.values))
        if devices.reading_waits(better):
            best = torch.where(better[:, None, None], points, self.points)
        else:  # whole rows: a few of them are copied faster than all are compared
            index = better.nonzero().flatten()
            best = self.points.index_copy_(0, index, points[index])
        values = torch.where(better, values, self.values)
        return replace(self, points=best, values=values, found_at=torch.where(left & wrong, number, self.found_at))

    def take(self, chosen: Tensor) -> BestPoint:
        """Select some of the images by a (B,) bool mask."""
        return replace(self, **_picked(self, chosen.nonzero().flatten()))


def _of(noise: Noise, index: Tensor) -> Noise:
    return replace(noise, positions=noise.positions[index])


def _picked(held: Walk | BestPoint, index: Tensor) -> dict[str, Any]:
    """The tensors of the images ``index`` (B',) only."""
    found = {field.name: getattr(held, field.name) for field in fields(held)}
    return {name: value[index] for name, value in found.items() if isinstance(value, Tensor)}
