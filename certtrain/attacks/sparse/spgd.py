"""sPGD: a few pixels, found by gradient ascent on one logit a pixel (Zhong et al., arXiv 2405.05075)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import kernels
from ...bounds import PerturbationSet, SparseBall
from ...errors import check
from ...noise import Noise, key_of
from ...step import Batch, Step
from ..base import Attack, AttackResult, gradient_of
from ..objective import CrossEntropy, Objective, lead

Variant = Literal["unprojected", "projected", "coin"]
STRETCH = 10
"""Iterations between two looks at which images are fooled by now: each look waits for a GPU."""


@dataclass(frozen=True)
class SparsePgd(Attack):
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
        objective: what is climbed; null for what the loss asks for, which is the cross-entropy for most.
    """

    balls: ClassVar[tuple[type[PerturbationSet], ...]] = (SparseBall,)

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

    def propose(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> AttackResult:
        assert isinstance(ball, SparseBall)
        walk = self.begin(batch, ball, step)
        projected = self.variant == "projected"
        if self.variant == "coin":
            projected = bool(key_of(step.noise.key, "variant") & 1)
        found = self._last if self.keep == "last" else self._best
        return found(model, batch, ball, step, walk, projected)

    def begin(self, batch: Batch, ball: SparseBall, step: Step) -> Walk:
        """Where the walk starts."""
        center = ball.grouped(batch.images)
        p = 2 * step.noise.uniform(center.shape[1:], "magnitudes", center.dtype) - 1
        p = torch.minimum(torch.maximum(p, -center), 1 - center)
        m = step.noise.normal(center.shape[2:], "logits", center.dtype)
        return Walk.starting(center, p, m, ball.counts(center), step.noise)

    def _last(
        self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step, walk: Walk, projected: bool
    ) -> AttackResult:
        shape, climbed, trace = batch.images.shape[1:], self.objective or CrossEntropy(), {}
        reference = climbed.reference(model, batch)
        for number in range(self.steps):
            points = ball.ungrouped(walk.points, shape)
            logits, gradient = gradient_of(model, points, lambda z: climbed(z, reference))
            if not number:
                trace = {"start": points, "logits": logits, "gradient": gradient}
            walk = self.moved(walk, ball.grouped(gradient), projected, number)
        self.ended(walk, batch, step)
        return AttackResult(ball.ungrouped(walk.points, shape), trace)

    def _best(
        self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step, walk: Walk, projected: bool
    ) -> AttackResult:
        shape, climbed = batch.images.shape[1:], self.objective or CrossEntropy()
        reference = climbed.reference(model, batch)
        with torch.no_grad():
            logits = model(batch.images)
        best, values = walk.center.clone(), climbed(logits, reference)
        found_at = torch.where(lead(logits, batch.labels) > 0, -1, 0)
        alone = self.attack_mode in ("eval", "clean")  # else batch norm has to see the whole batch
        stretch = 1 if values.device.type == "cpu" else STRETCH
        for number in range(self.steps + 1):
            if alone and number % stretch == 0:
                left = found_at[walk.rows] < 0
                if not bool(left.all()):
                    walk, values = walk.take(left), values[left]
                if not len(walk.rows):
                    break
            points, rows = ball.ungrouped(walk.points, shape), walk.rows
            gradient = points
            if number < self.steps:
                logits, gradient = gradient_of(model, points, lambda z, rows=rows: climbed(z, reference[rows]))
            else:
                with torch.no_grad():
                    logits = model(points)
            reached = climbed(logits, reference[rows])
            wrong = ~(lead(logits, batch.labels[rows]) > 0)
            open_ = found_at[rows] < 0
            better = open_ & (wrong | (reached >= values))
            best[rows] = torch.where(better[:, None, None], walk.points, best[rows])
            values = torch.where(better, reached, values)
            found_at[rows] = torch.where(open_ & wrong, number, found_at[rows])
            if number < self.steps:
                walk = self.moved(walk, ball.grouped(gradient), projected, number)
        return AttackResult(ball.ungrouped(best, shape), {"found_at": found_at})

    def moved(self, walk: Walk, gradient: Tensor, projected: bool, number: int) -> Walk:
        """One step further; with new logits for images whose mask has stood still for too long."""
        p, m, mask, points, changed = kernels.spgd_step(
            gradient, walk.p, walk.m, walk.center, walk.mask, walk.k,
            alpha=self.alpha, beta=self.beta, projected=projected,
        )  # fmt: skip
        walk = replace(walk, p=p, m=m, mask=mask, points=points)
        if self.patience is None:
            return walk
        still = torch.where(changed, 0, walk.still + 1)
        stuck = still >= self.patience
        if stuck.device.type != "cpu" or bool(stuck.any()):  # on a GPU to look is dearer than to draw
            fresh = walk.noise.normal(m.shape[1:], f"logits/{number}", m.dtype)
            m = torch.where(stuck[:, None], fresh, m)
            points, mask = kernels.sparse_apply(walk.center, p, m, walk.k)
            walk = replace(walk, m=m, mask=mask, points=points)
        return replace(walk, still=torch.where(stuck, 0, still))

    def ended(self, walk: Walk, batch: Batch, step: Step) -> None:
        """Called with where the walk of a whole batch ended."""


@dataclass(frozen=True)
class Walk:
    """Where the attack on some images of a batch stands; images are grouped (B, M, N).

    Args:
        rows: (B,) int64, their numbers in the batch.
        center: the images. p: (B, M, N) magnitudes. m: (B, N) logits. mask: (B, N) uint8. points: (B, M, N).
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
        """Of some of them alone: (B,) bool."""
        index = chosen.nonzero().flatten()
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {name: value[index] for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, **kept, noise=replace(self.noise, positions=self.noise.positions[index]))
