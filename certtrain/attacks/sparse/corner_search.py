"""CornerSearch: few pixels, combined from the best single ones (Croce and Hein, arXiv 1909.05040)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...bounds import PerturbationSet, SparseBall
from ...errors import InputError, check
from ...noise import Noise
from ...step import Batch, Step
from ..base import Attack, AttackResult
from ..objective import lead

CHUNK = 1000
"""Points of one image that pass through the network at once."""

MEMBERS = 4
"""Entries of a unit M, at most: all 2^M corners are tried."""


@dataclass(frozen=True)
class CornerSearch(Attack[SparseBall]):
    """All corners of every single pixel (or feature), then random combinations of the best ones: black-box.

    Single changes are ranked for each class by how far that class is ahead of the label, for the label itself by the
    margin over all others. Then for sizes 2, 3, … k and each class ``per_size`` combinations of its best changes are
    tried, drawn with replacement, rank r of n from 0 on with probability (2(n - r) - 1) / n². If one pixel is changed
    twice, the later change counts.

    Each image's search ends with the chunk of ``CHUNK`` points that contains its first success. Returns that point,
    else the one with the smallest lead of the label, the image included; images misclassified from the start are
    unchanged. The trace holds ``queries`` (B,) int64, the number of passes of an image, and ``found_at`` (B,) int64,
    the number of the first misclassified pass: 0 for the image itself, -1 for never. At most
    1 + 2^M N + (k - 1) K per_size queries, for N units of M numbers and K classes.

    Args:
        per_size: combinations for each size and class.
        best: single changes of each order that are combined.
    """

    needs: ClassVar[type[PerturbationSet]] = SparseBall
    takes_gradients: ClassVar[bool] = False

    per_size: int = 1000
    best: int = 100

    def __post_init__(self) -> None:
        check(self.per_size >= 1, "per_size", self.per_size, "a whole number >= 1")
        check(self.best >= 1, "best", self.best, "a whole number >= 1")

    def check_ball(self, ball: PerturbationSet, where: str = "attack", among: type[Attack] | None = None) -> None:
        super().check_ball(ball, where, among)
        sparse = SparseBall.of(ball)
        if sparse.unit not in ("pixel", "feature"):
            found = f"found CornerSearch for a SparseBall of {sparse.plural}"
            raise InputError(f"{where}.type: {found}; accepted: pixels or features, or SparseRs")

    def propose(self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step) -> AttackResult:
        members = ball.grouped(batch.images).shape[1]
        check(members <= MEMBERS, "unit", ball.unit, f"feature, or images of {MEMBERS} channels at most, not {members}")
        search = CombinationSearch.starting(model, batch, ball)
        rows = torch.arange(len(batch), device=batch.images.device)
        if self.attack_mode in ("eval", "clean"):
            for row in rows.split(1):
                self._search(search, row, step.noise, CHUNK)
        else:  # batch norm has to see one point of each image of the whole batch
            self._search(search, rows, step.noise, 1)
        trace = {"queries": search.queries, "found_at": search.found_at}
        return AttackResult(ball.ungrouped(search.best, batch.images.shape[1:]), trace)

    def _search(self, search: CombinationSearch, rows: Tensor, noise: Noise, width: int) -> None:
        """Search around the images ``rows`` (A,), with ``width`` points of each in one pass."""
        noise, seen = replace(noise, positions=noise.positions[rows]), []
        singles = torch.arange(len(search.corners) * search.center.shape[2], device=rows.device)
        for part in singles.split(width):
            if not search.any_active(rows, 1):
                return
            seen.append(search.query(rows, part.expand(len(rows), -1).unsqueeze(2)))
        if not search.any_active(rows, 2):
            return
        orders = best_singles(torch.cat(seen, 1), search.batch.labels[rows], self.best)
        for size in range(2, int(search.k[rows].max()) + 1):
            for number, order in enumerate(orders.unbind(1)):
                draws = noise.uniform((self.per_size, size), f"{size}/{number}", torch.float64)
                ranks = (order.shape[1] * (1 - (1 - draws).sqrt())).long()  # the inverse of the distribution
                changes = order.gather(1, ranks.flatten(1)).reshape(ranks.shape)
                for part in changes.split(width, 1):
                    if not search.any_active(rows, size):
                        return
                    search.query(rows, part)


@dataclass(frozen=True)
class CombinationSearch:
    """The state of a search on a batch of images, grouped (B, M, N); updated in place.

    Args:
        corners: (2^M, M). The change number j of a single unit takes unit j // 2^M to corner j % 2^M.
        k: (B,) int64.
        best: (B, M, N) the best points.
        leads: (B,) the lead of the label there.
        queries, found_at: (B,) int64.
    """

    model: nn.Module
    batch: Batch
    ball: SparseBall
    center: Tensor
    corners: Tensor
    k: Tensor
    best: Tensor
    leads: Tensor
    queries: Tensor
    found_at: Tensor

    @classmethod
    def starting(cls, model: nn.Module, batch: Batch, ball: SparseBall) -> CombinationSearch:
        center = ball.grouped(batch.images)
        members = torch.arange(center.shape[1], device=center.device)
        numbers = torch.arange(2 ** len(members), device=center.device)
        corners = ((numbers[:, None] >> members) & 1).to(center.dtype)
        k = torch.as_tensor(ball.counts(center), device=center.device)
        k = k.clamp(0, center.shape[2]).expand(len(batch))
        leads = lead(model(batch.images), batch.labels)
        found_at = torch.where(leads > 0, -1, 0)
        return cls(
            model, batch, ball, center, corners, k, center.clone(), leads, torch.ones_like(found_at), found_at
        )  # fmt: skip

    def active(self, rows: Tensor, size: int) -> Tensor:
        """(A,) bool: still classified correctly, and allowed to change ``size`` units."""
        return (self.found_at[rows] < 0) & (self.k[rows] >= size)

    def any_active(self, rows: Tensor, size: int) -> bool:
        return bool(self.active(rows, size).any())

    def query(self, rows: Tensor, changes: Tensor) -> Tensor:
        """Logits (A, c, K) of the images ``rows`` (A,) after each of their ``changes`` (A, c, size), single ones by
        number. Images no longer active are passed unchanged."""
        count, active = changes.shape[1], self.active(rows, changes.shape[2])
        units, corners = changes // len(self.corners), changes % len(self.corners)
        points = self.center[rows].repeat_interleave(count, 0)
        each = torch.arange(len(points), device=rows.device)[active.repeat_interleave(count)]
        for unit, corner in zip(units.flatten(0, 1).unbind(1), corners.flatten(0, 1).unbind(1), strict=True):
            points[each, :, unit[each]] = self.corners[corner[each]]
        logits = self.model(self.ball.ungrouped(points, self.batch.images.shape[1:]))
        leads = lead(logits, self.batch.labels[rows].repeat_interleave(count)).reshape(-1, count)
        wrong = ~(leads > 0)
        first = torch.where(wrong.any(1), wrong.int().argmax(1), leads.argmin(1))
        least = leads.gather(1, first[:, None])[:, 0]
        hit = active & wrong.any(1)
        better = hit | (active & (least < self.leads[rows]))
        chosen = points.unflatten(0, (len(rows), count))[torch.arange(len(rows), device=rows.device), first]
        self.best[rows] = torch.where(better[:, None, None], chosen, self.best[rows])
        self.leads[rows] = torch.where(better, least, self.leads[rows])
        self.found_at[rows] = torch.where(hit, self.queries[rows] + first, self.found_at[rows])
        self.queries[rows] += count
        return logits.unflatten(0, (len(rows), count))


def best_singles(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The indices (A, K, n) of the best of T single changes with logits (A, T, K).

    Ranked for each class by how far it is ahead of the label, for the label itself by the margin over all others.
    """
    own = labels[:, None, None].expand(-1, logits.shape[1], 1)
    margins = -lead(logits.flatten(0, 1), own.flatten()).reshape(own.shape)
    scores = (logits - logits.gather(2, own)).scatter(2, own, margins)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].transpose(1, 2)
