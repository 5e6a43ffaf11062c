"""Part of an l0 set: a subproblem of a search over changed units, with some of them decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from .interval import Interval
from .region import Region
from .sparse import SparseBall


@dataclass(frozen=True)
class SparsePart(Region):
    """Part of a sparse set around each of ``images``: free units, and others of which a limited number may change.

    Args:
        ball: defines the units; its k is not used.
        images: (B, *shape).
        free, possible: disjoint bool masks as ``images``, constant within a unit: units that may always change, and
            units of which at most ``budget`` may.
        budget: (B,) int64.
    """

    ball: SparseBall
    images: Tensor
    free: Tensor
    possible: Tensor
    budget: Tensor

    @classmethod
    def of(cls, ball: SparseBall, images: Tensor, free: Tensor, possible: Tensor, budget: Tensor) -> SparsePart:
        """A part from masks over units, (B, N) bool."""
        like = ball.grouped(images)
        free_entries, possible_entries = (
            ball.ungrouped(mask.unsqueeze(1).expand_as(like), images.shape[1:]) for mask in (free, possible)
        )
        return cls(ball, images, free_entries, possible_entries, budget)

    @property
    def hull(self) -> Interval:
        changeable = self.free | (self.possible & (self.budget > 0).reshape(-1, *[1] * (self.images.ndim - 1)))
        return Interval.from_bounds(torch.where(changeable, 0, self.images), torch.where(changeable, 1, self.images))

    @property
    def is_box(self) -> bool:
        return False

    @property
    def is_local(self) -> bool:
        return self.ball.is_local

    def take(self, index: Tensor) -> SparsePart:
        return SparsePart(self.ball, self.images[index], self.free[index], self.possible[index], self.budget[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> SparsePart:
        free, possible = (function(mask.to(self.images.dtype)) > 0.5 for mask in (self.free, self.possible))
        return SparsePart(self.ball, function(self.images), free, possible, self.budget)

    def windows(self, of: Tensor, function: Callable[[Tensor], Tensor]) -> SparsePart:
        return dataclasses.replace(self.map(function), budget=self.budget[of])

    def contains(self, points: Tensor) -> Tensor:
        valid = ((points >= 0) & (points <= 1)).flatten(1).all(1)
        moved = ~(points == self.images)  # NaN counts as moved
        forbidden = (moved & ~self.free & ~self.possible).flatten(1).any(1)
        count = self.ball.grouped(moved & self.possible).any(1).sum(1)
        return valid & ~forbidden & (count <= self.budget)

    def nearest(self, points: Tensor) -> Tensor:
        points = points.to(self.images.dtype)
        within = torch.where(self.possible, points, self.images)
        projected = self.ball.with_epsilon(self.budget).project(self.images, within)
        return torch.where(self.free, points.clamp(0, 1), projected)

    def concretise(self, forms: Tensor) -> Tensor:
        values, gains = self.ball.effects(forms, self.images)
        return values + torch.where(self._chosen(gains), gains, 0).sum(2)

    def minimiser(self, forms: Tensor) -> Tensor:
        """(B, *shape): a point of each set that minimises its linear form (B, *shape)."""
        chosen = self._chosen(self.ball.effects(forms.unsqueeze(1), self.images)[1]).transpose(1, 2).contiguous()
        like = self.ball.grouped(self.images)
        chosen = self.ball.ungrouped(chosen.squeeze(2).unsqueeze(1).expand_as(like), self.images.shape[1:])
        corners = torch.where(forms > 0, 0, torch.where(forms < 0, 1, self.images))
        return torch.where(chosen, corners, self.images)

    def _chosen(self, gains: Tensor) -> Tensor:
        """(B, R, N) bool: the units that change at the minimum of forms, given the units' effects (B, R, N)."""
        free, possible = (self.ball.grouped(mask).any(1).unsqueeze(1) for mask in (self.free, self.possible))
        counts = self.budget.repeat_interleave(gains.shape[1])
        effects = torch.where(possible, gains.detach().neg(), 0)
        mask = kernels.topk_mask(effects.flatten(0, 1), counts).reshape(gains.shape).bool()
        return free | (mask & possible)
