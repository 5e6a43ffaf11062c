"""Sparse-RS: random search over few pixels, from logits only (Croce et al., arXiv 2006.12834)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import devices, kernels
from ...bounds import PerturbationSet, SparseBall
from ...errors import check
from ...noise import Noise
from ...step import Batch, Step
from ..base import Attack, AttackResult
from ..objective import CrossEntropy, lead
from .best_so_far import STRETCH

SCHEDULE = ((50, 2), (200, 4), (500, 5), (1000, 6), (2000, 8), (4000, 10), (6000, 12), (8000, 15), (10000, 20))
"""The divisor of p_init up to each of these moves, of 10000. A longer search begins with p_init itself."""


@dataclass(frozen=True)
class SparseRs(Attack[SparseBall]):
    """Random search over the corners of k pixels (or other units of the ball): black-box.

    It starts with k random units at random corners, numbers 0 or 1. Each move takes some of them back to the image and
    sets as many unused ones to random corners; it is kept if the loss drops or the image is misclassified. Where fewer
    are unused than move, units that were just taken back serve again.

    Returns the first point that is misclassified, else that with the smallest loss, the image included; clean errors
    stay as they are. Random numbers are keyed by sample and by number of the point. Its trace holds ``queries`` (B,)
    int64, how often an image was passed to the network, and ``found_at`` (B,) int64, the number of the first pass that
    was misclassified: 0 for the image itself, -1 for never.

    Args:
        queries: points that are tried for each image, beside the image itself, in each restart.
        p_init: share of the k units that moves; it shrinks by ``SCHEDULE``. Published: 0.8, for large images 0.3.
        objective: the loss to minimise: ``cross_entropy`` the log-probability of the label, ``margin`` the label's lead
            (published for large images).
        restarts: number of searches; each one continues with the images that are still classified correctly.
    """

    needs: ClassVar[type[PerturbationSet]] = SparseBall
    takes_gradients: ClassVar[bool] = False

    queries: int = 10000
    p_init: float = 0.8
    objective: Literal["cross_entropy", "margin"] = "cross_entropy"
    restarts: int = 1

    def __post_init__(self) -> None:
        check(self.queries >= 1, "queries", self.queries, "a whole number >= 1")
        check(0 < self.p_init <= 1, "p_init", self.p_init, "a number in (0, 1]")
        check(self.restarts >= 1, "restarts", self.restarts, "a whole number >= 1")

    def share(self, number: int) -> float:
        """The number of the k units that the ``number``-th move changes, from 1 on."""
        rescaled = number * 10000 // self.queries
        divisor = next(divisor for last, divisor in SCHEDULE if rescaled <= last) if rescaled else 1
        return self.p_init / divisor

    def propose(self, model: nn.Module, batch: Batch, ball: SparseBall, step: Step) -> AttackResult:
        shape, center = batch.images.shape[1:], ball.grouped(batch.images)
        k = torch.as_tensor(ball.counts(center), device=center.device).clamp(0, center.shape[2]).expand(len(batch))
        reference = CrossEntropy().reference(model, batch)
        logits = model(batch.images)
        best, values = center.clone(), self.loss(logits, reference, batch.labels)
        searched = lead(logits, batch.labels) > 0
        found_at = torch.where(searched, -1, 0)
        queries = torch.ones_like(found_at)
        searched &= k > 0
        alone = self.attack_mode in ("eval", "clean")  # else batch norm has to see the whole batch
        stretch = STRETCH if devices.reading_waits(center) else 1
        for restart in range(self.restarts):
            walk = SearchState.starting(center, k, step.again(restart).noise)
            for number in range(self.queries):
                if number % stretch == 0:
                    left = searched[walk.rows]
                    if not bool(left.any()):
                        break
                    if alone and not bool(left.all()):
                        walk = walk.take(left)
                rows = walk.rows
                tried = self.moved(walk, number) if number else walk
                logits = model(ball.ungrouped(tried.points, shape))
                reached = self.loss(logits, reference[rows], batch.labels[rows])
                wrong, open_ = ~(lead(logits, batch.labels[rows]) > 0), searched[rows]
                walk = walk.where(open_ & (wrong | (reached < walk.values)), replace(tried, values=reached))
                better = open_ & (wrong | (reached < values[rows]))
                best[rows] = torch.where(better[:, None, None], tried.points, best[rows])
                values[rows] = torch.where(better, reached, values[rows])
                found_at[rows] = torch.where(open_ & wrong, queries[rows], found_at[rows])
                queries[rows] += 1
                searched[rows] = open_ & ~wrong
        return AttackResult(ball.ungrouped(best, shape), {"queries": queries, "found_at": found_at})

    def loss(self, logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
        """The loss (B,) to minimise."""
        return lead(logits, labels) if self.objective == "margin" else -CrossEntropy()(logits, reference)

    def moved(self, walk: SearchState, number: int) -> SearchState:
        """Move some of the used units to other places, with other colours."""
        share = self.share(number)
        count = (walk.k.double() * share).floor().clamp(min=1).long().minimum(walk.k)
        scores = walk.noise.uniform(walk.used.shape[1:], f"place/{number}")
        left = kernels.topk_mask(scores.masked_fill(~walk.used, -math.inf), count).bool()
        unused = torch.where(left, scores - 1, scores)  # those that are left come last
        taken = kernels.topk_mask(unused.masked_fill(walk.used & ~left, -math.inf), count).bool()
        colours = corners(walk.center, walk.noise, number, max(math.floor(walk.most * share), 1))
        colours[:, :, 0] = self._other(colours[:, :, 0], walk, taken, count, number)
        points = torch.where(left[:, None], walk.center, walk.points)
        return replace(walk, points=coloured(points, taken, colours), used=(walk.used & ~left) | taken)

    def _other(self, colour: Tensor, walk: SearchState, taken: Tensor, count: Tensor, number: int) -> Tensor:
        """(B, M) the first colour; with one entry flipped where it equals that of the only unit that moves, which would
        leave the point unchanged."""
        unit = taken.int().argmax(1)[:, None, None].expand(-1, colour.shape[1], 1)
        idle = (count == 1) & (colour == walk.points.gather(2, unit)[:, :, 0]).all(1)
        member = walk.noise.integers(colour.shape[1], (1,), f"member/{number}")
        flipped = torch.arange(colour.shape[1], device=colour.device) == member
        return torch.where(idle[:, None] & flipped, 1 - colour, colour)


@dataclass(frozen=True)
class SearchState:
    """The state of the search on some images of a batch, grouped (B, M, N).

    Args:
        rows: (B,) int64, their numbers in the batch.
        center: the images. points: (B, M, N) where they stand, corners in the units that are ``used`` (B, N) bool.
        values: (B,) the loss there.
        k: (B,) int64 how many units are used; most: of any image.
        noise: of these images.
    """

    rows: Tensor
    center: Tensor
    points: Tensor
    used: Tensor
    values: Tensor
    k: Tensor
    most: int
    noise: Noise

    @classmethod
    def starting(cls, center: Tensor, k: Tensor, noise: Noise) -> SearchState:
        most = int(k.max())
        used = kernels.topk_mask(noise.uniform(center.shape[2:], "place/0"), k.contiguous()).bool()
        points = coloured(center, used, corners(center, noise, 0, max(most, 1)))
        rows = torch.arange(len(center), device=center.device)
        values = torch.full((len(center),), math.inf, dtype=center.dtype, device=center.device)
        return cls(rows, center, points, used, values, k, most, noise)

    def take(self, chosen: Tensor) -> SearchState:
        """Select some of the images by a (B,) bool mask."""
        index = chosen.nonzero().flatten()
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {name: value[index] for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, **kept, noise=replace(self.noise, positions=self.noise.positions[index]))

    def where(self, chosen: Tensor, other: SearchState) -> SearchState:
        """Take the state of ``other`` for the chosen images, (B,) bool."""
        return replace(
            self,
            points=torch.where(chosen[:, None, None], other.points, self.points),
            used=torch.where(chosen[:, None], other.used, self.used),
            values=torch.where(chosen, other.values, self.values),
        )


def corners(like: Tensor, noise: Noise, number: int, count: int) -> Tensor:
    """Random corners (B, M, count) of a unit, for images ``like`` (B, M, N)."""
    return (noise.uniform((count, like.shape[1]), f"colour/{number}") < 0.5).to(like.dtype).transpose(1, 2)


def coloured(points: Tensor, units: Tensor, colours: Tensor) -> Tensor:
    """Set the chosen ``units`` (B, N) bool of images (B, M, N) to ``colours`` (B, M, n), in order."""
    order = (units.cumsum(1) - 1).clamp(0, colours.shape[2] - 1)
    return torch.where(units[:, None], colours.gather(2, order[:, None].expand_as(points)), points)
