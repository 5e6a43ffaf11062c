"""SAIF: the Frank-Wolfe method on a mask and a perturbation (Imtiaz et al., arXiv 2212.07495)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import kernels
from ...bounds import PerturbationSet, SparseBall
from ...errors import check
from ...step import Batch, Step
from ..base import Attack, AttackResult, gradient_of
from ..objective import CrossEntropy, Objective
from .best_so_far import BestSoFar

FINEST = 40
"""Halvings after which the line search leaves an image unchanged."""


@dataclass(frozen=True)
class Saif(Attack[SparseBall]):
    """x' = x + s ⊙ p with a mask s in [0, 1] of one number a unit, sum(s) <= k, and a perturbation p in [-1, 1].

    In step t both go a share mu of the way to the best points of their sets for the gradient there: p to its sign, s to
    the k units that promise most, of those that promise anything. p is cut to valid images. s starts at k random
    units, p uniformly.

    There are two forms. By default the one that sPGD's authors evaluate with: mu = 1/sqrt(t + 1), and the network sees
    only the k largest s, as a mask of 0 and 1. Theirs also puts that mask back into s, which so can never change again
    once mu < 1/2, after four steps; here s stays the average. With ``line_search`` the published one: mu = 1/(2^r
    sqrt(t + 1)), r counted up from 1 until the objective does not fall, the network sees s itself, and only the last
    mask is cut to the k largest: no other point can be the result.

    The result is the first point of the ball that is misclassified, else that with the largest objective, the image
    included; clean errors stay as they are. Its trace holds ``found_at`` (B,) int64: after how many steps an image was
    first misclassified, 0 for the start or a clean error, -1 for never.

    Args:
        steps: number of updates.
        line_search: the second form.
        objective: the objective to maximise; null for the loss' own, the cross-entropy for most.
    """

    needs: ClassVar[type[PerturbationSet]] = SparseBall

    steps: int = 100
    line_search: bool = False
    objective: Objective | None = None

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, "a whole number >= 1")

    def toward(self, objective: Objective) -> Saif:
        return self if self.objective is not None else replace(self, objective=objective)

    def propose(self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step) -> AttackResult:
        shape, objective = batch.images.shape[1:], self.objective or CrossEntropy()
        reference = objective.reference(model, batch)
        best = BestSoFar.clean(model, batch, objective, reference)
        at = _Iterate.starting(batch, ball, step)

        def look(tried: _Iterate) -> Tensor:
            with torch.no_grad():
                return objective(model(ball.ungrouped(tried.mixed(), shape)), reference[tried.rows])

        for number in range(self.steps + 1):
            left = best.open(at.rows, number, self.attack_mode)
            if left is not None:
                at = at.take(left)
            if not len(at.rows):
                break
            last = number == self.steps
            seen = at.masked() if last or not self.line_search else at.mixed()
            points, labels = ball.ungrouped(seen, shape), reference[at.rows]
            logits, gradient = gradient_of(model, points, lambda z, labels=labels: objective(z, labels))
            values = objective(logits, labels)
            if last or not self.line_search:
                best = best.after(at.rows, points, logits, batch.labels, values, number)
            if last:
                break
            goal = at.goal(ball.grouped(gradient))
            share = torch.full_like(values, (number + 1) ** -0.5)
            at = at.searched(goal, share, values, look) if self.line_search else at.moved(goal, share)
        return AttackResult(best.images, {"found_at": best.found_at})


@dataclass(frozen=True)
class _Iterate:
    """The state of the method on R images of a batch, grouped (R, M, N).

    Args:
        rows: (R,) int64, their numbers in the batch.
        center: the clean images.
        s, p: mask (R, N) and perturbation (R, M, N).
        halvings: (R,) int64, the line search's r.
        k: an int, or int64 (R,).
    """

    rows: Tensor
    center: Tensor
    s: Tensor
    p: Tensor
    halvings: Tensor
    k: int | Tensor

    @classmethod
    def starting(cls, batch: Batch, ball: SparseBall, step: Step) -> _Iterate:
        center = ball.grouped(batch.images)
        k = ball.counts(center)
        p = 2 * step.noise.uniform(center.shape[1:], "magnitudes", center.dtype) - 1
        p = torch.minimum(torch.maximum(p, -center), 1 - center)
        s = kernels.topk_mask(step.noise.uniform(center.shape[2:], "mask", center.dtype), k).to(center.dtype)
        rows = torch.arange(len(center), device=center.device)
        return cls(rows, center, s, p, torch.ones_like(rows), k)

    def take(self, chosen: Tensor) -> _Iterate:
        """Select some of the images by an (R,) bool mask."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[chosen] for name, value in held.items() if isinstance(value, Tensor)})

    def mixed(self) -> Tensor:
        """(R, M, N) x + s ⊙ p: valid images, but too many units may differ."""
        return (self.center + self.s[:, None] * self.p).clamp(0, 1)

    def masked(self) -> Tensor:
        """(R, M, N) x + p in the k units with the largest s: points of the ball. Where s is 0 no unit changes."""
        mask = kernels.topk_mask(self.s, self.k).bool() & (self.s > 0)
        return torch.where(mask[:, None], (self.center + self.p).clamp(0, 1), self.center)

    def goal(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The mask and perturbation that maximise the linear form of this gradient (R, M, N). NaN counts as 0."""
        promise = (torch.where(gradient.isnan(), 0, gradient) * self.p).sum(1)
        helps = promise > 0
        z = kernels.topk_mask(torch.where(helps, promise, 0), self.k).bool() & helps
        # The derivative in p is s times the gradient. Where that is 0 any p is best, and the gradient's sign the one
        # that serves if the unit is selected next; a p of sign(0) = 0 would hide all units but the first k for good.
        # 200 digits, a CNN trained with sPGD, 2 pixels, 100 steps: 64 % stand; 72 % where s is the hard mask, and 84 %
        # where p goes to sign(0) as well, as in released code.
        v = torch.where(gradient > 0, 1, torch.where(gradient < 0, -1, self.p))
        return z.to(self.s.dtype), v

    def moved(self, goal: tuple[Tensor, Tensor], share: Tensor) -> _Iterate:
        """Move a share (R,) of the way."""
        z, v = goal
        p = self.p + share[:, None, None] * (v - self.p)
        p = torch.minimum(torch.maximum(p, -self.center), 1 - self.center)
        return replace(self, s=self.s + share[:, None] * (z - self.s), p=p)

    def searched(
        self, goal: tuple[Tensor, Tensor], share: Tensor, values: Tensor, look: Callable[[_Iterate], Tensor]
    ) -> _Iterate:
        """Move a share (R,) of the way, halved until ``look`` finds at least ``values`` (R,); do not move if it never
        does."""
        halvings = self.halvings
        while True:
            tried = self.moved(goal, share * 0.5 ** halvings.to(share.dtype))
            worse = ~(look(tried) >= values)
            going = worse & (halvings < FINEST)
            if not bool(going.any()):
                break
            halvings = torch.where(going, halvings + 1, halvings)
        s = torch.where(worse[:, None], self.s, tried.s)
        return replace(tried, s=s, p=torch.where(worse[:, None, None], self.p, tried.p), halvings=halvings)
