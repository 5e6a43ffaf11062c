"""Branch and bound on which units of an image change: complete for sparse sets of few units, whatever the network.

A subproblem is a ``SparsePart``: units that are free, others of which so many at most may change. Linear bounds
concretised over it are exact for the set's convex hull (as arXiv 2511.10576 has it for a whole l0 ball). Where they
prove too little the units that could do harm come first, one at a time: "this one changes, those before it do not", and
one subproblem more in which none of them does. A leaf, where nothing is left to choose, is a box: halved
where few inputs vary in it, otherwise split at neurons. Other complete verifiers of few pixels cover the choices by
larger sets of pixels, each of them a box: Calzone (Shapira, Avneri, Drachsler-Cohen, OOPSLA 2023) and CoVerD (arXiv
2405.10924).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import Bounds, Box
from ..bounds.clock import OutOfTime, look, now, until
from ..bounds.crown import LinearBound, backward, crown_bounds, relax_all, rows_at_a_time
from ..bounds.folding import fold
from ..bounds.sparse import SparseBall
from ..bounds.sparse_part import SparsePart
from .bab import branch_and_bound
from .frontier import Frontier
from .input_split import INPUTS, split_inputs
from .known import Known
from .optimise import finite, with_offsets
from .problem import Problem
from .search import Outcome, Search
from .tree import in_turns

BATCH = 512
"""Subproblems that are bounded in one round."""

MOST = 64
"""Units that one subproblem is split at; the others wait for the tighter bounds of what is left."""


def sparse_ball(problem: Problem) -> SparseBall | None:
    """The set around each image, if it is a sparse one."""
    region = problem.region
    return region.perturbation(SparseBall)


def split_locations(
    problem: Problem,
    known: Known,
    search: Search,
    timeout: float,
    violates: Callable[[int, Tensor], bool],
    batch: int = BATCH,
) -> Outcome:
    """Prove or refute what ``known`` leaves open of problems over sparse sets.

    Args:
        search: how leaves of many inputs go through branch and bound on neurons.
        timeout: seconds of each image's share of the time; as many again on the wall clock for each image at most. The
            wall clock is looked at within rounds; what a round has begun by then counts as not begun.
        violates: whether an input (*shape) of the given image's set is a counterexample, by replay.
    """
    return _Splitting(problem, known, search, timeout, violates, batch).run()


@dataclass(frozen=True)
class _Parts(Frontier):
    """Open subproblems, P of them, of the images numbered ``image`` (P,).

    ``free``, ``possible`` (P, N) bool, by units; ``budget`` (P,); ``rows`` (P, R) lower bounds; ``rank`` (P, N) which
    units to split at first, and at how many, ``first`` (P,).
    """

    free: Tensor
    possible: Tensor
    budget: Tensor
    rows: Tensor
    rank: Tensor
    first: Tensor

    def children(self) -> _Parts:
        """For each of the ``first`` units that it changes and those before it do not; and that none of them does."""
        count = self.first + 1
        parents = torch.arange(len(self), device=count.device).repeat_interleave(count)
        number = torch.arange(len(parents), device=count.device) - (count.cumsum(0) - count)[parents]
        parts, number = self.take(parents), number.unsqueeze(1)
        chosen = (parts.rank == number) & (number < parts.first.unsqueeze(1))
        before = torch.minimum(number, parts.first.unsqueeze(1) - 1)
        budget = parts.budget - chosen.any(1).long()
        return _Parts(
            parts.image, parts.free | chosen, parts.possible & (parts.rank > before), budget,
            parts.rows, parts.rank, parts.first,
        )  # fmt: skip

    def settled(self) -> _Parts:
        """With units that may all change free, and none possible without a budget."""
        every = (self.budget >= self.possible.sum(1)).unsqueeze(1)
        free = self.free | (self.possible & every)
        possible = self.possible & ~every & (self.budget > 0).unsqueeze(1)
        budget = torch.where(possible.any(1), self.budget, 0)
        return _Parts(self.image, free, possible, budget, self.rows, self.rank, self.first)


class _Splitting:
    def __init__(self, problem: Problem, known: Known, search: Search, timeout: float, violates, batch: int):
        ball = sparse_ball(problem)
        assert ball is not None
        self.problem, self.known, self.ball = problem, known, ball
        self.search, self.timeout, self.violates = search, timeout, violates
        self.images = known.region_of(problem).images
        self.forms, self.offsets = known.rows_of(problem.specification)
        self.batch = max(1, min(batch, rows_at_a_time(known.network, self.forms.shape[1], known.rows)))
        count, device = len(problem), known.rows.device
        self.lower = torch.full((count,), torch.inf, dtype=known.rows.dtype, device=device)
        self.seconds = torch.zeros(count, dtype=torch.float64)
        self.counterexamples: list[Tensor | None] = [None] * count
        self.reasons: list[str | None] = [None] * count
        units = ball.units(self.images.shape[1:])
        none = torch.zeros(count, units, dtype=torch.bool, device=device)
        k = ball.counts(self.images)
        budget = k if isinstance(k, Tensor) else torch.full((count,), min(k, units), device=device)
        place = torch.arange(units, dtype=torch.int32, device=device).expand(count, -1)
        self.open = _Parts(
            torch.arange(count, device=device), none, ~none, budget.clamp(max=units), known.rows, place, budget * 0
        )  # fmt: skip

    def run(self) -> Outcome:
        try:
            with until(now() + self.timeout * len(self.problem)):
                self._search()
        except OutOfTime:
            self._give_up(set(self.open.image.tolist()), "wall clock")
        proved = self._wanted(torch.arange(len(self.problem)))
        return Outcome(proved, self.counterexamples, self.lower, self.seconds, self.reasons)

    def _search(self) -> None:
        roots, self.open = self.open, self.open.take(self.open.image[:0])
        self._look_at(roots)
        while len(self.open):
            look()
            chosen = in_turns(self.open.image, self._worst(self.open), max(1, self.batch // 8))
            left = torch.ones(len(self.open), dtype=torch.bool, device=chosen.device)
            left[chosen] = False
            parents, self.open = self.open.take(chosen), self.open.take(left.nonzero().flatten())
            self._look_at(parents.children())

    def _worst(self, parts: _Parts) -> Tensor:
        """(P,) lower bounds of the worst margins."""
        return self.problem.specification.worst(parts.rows)

    def _look_at(self, parts: _Parts) -> None:
        """Bound subproblems, try their likeliest points, keep those that stay open; leaves are halved at once."""
        parts = parts.settled()
        every = torch.arange(len(parts), device=parts.image.device)
        for index in every.split(self.batch):
            try:
                some = self._looked_at(parts.take(index))
            except OutOfTime:
                self.open = self.open.joined(parts.take(every[index[0] :]))
                raise
            self._give_up({i for i in set(some.image.tolist()) if self.seconds[i] > self.timeout}, "timeout")

    def _looked_at(self, some: _Parts) -> _Parts:
        """Those that were wanted."""
        keep = self._wanted(some.image)
        self._close(some.take(~keep))
        some = some.take(keep)
        if len(some):
            some, leaf = self._timed(some.image, lambda: self._bound(some))
            self.open = self.open.joined(some.take(~leaf))
            if bool(leaf.any()):
                self._timed(some.take(leaf).image, lambda: self._solve(some.take(leaf)))
        return some

    def _timed(self, image: Tensor, work: Callable):
        """What it returns, its time shared by subproblems."""
        started = now()
        try:
            return work()
        finally:
            share = (now() - started) / len(image)
            self.seconds.index_add_(0, image.cpu(), torch.full((len(image),), share, dtype=torch.float64))

    def _bound(self, parts: _Parts) -> tuple[_Parts, Tensor]:
        """Those that stay open, and which of them (P,) are leaves."""
        network, image = self.known.network, parts.image
        region = SparsePart.of(self.ball, self.images[image], parts.free, parts.possible, parts.budget)
        given = {place: Bounds(b.lower[image], b.upper[image]) for place, b in self.known.bounds.items()}
        lines = relax_all(network, crown_bounds(network, region, given or None))
        bound = backward(network, len(network.operations) - 1, self.forms[image], lines)
        found = with_offsets(network, bound.lower(region), self.offsets[image])
        rows = torch.maximum(parts.rows, finite(found))
        parts = _Parts(image, parts.free, parts.possible, parts.budget, rows, parts.rank, parts.first)
        open_ = ~(self._worst(parts) > 0)
        self._try(parts, region, bound, open_)
        leaf = parts.budget == 0
        keep = open_ & self._wanted(image)
        self._close(parts.take(~keep))
        if bool(keep.any()):
            parts = self._ranked(parts, region, bound)
        return parts.take(keep), leaf[keep]

    def _ranked(self, parts: _Parts, region: SparsePart, bound: LinearBound) -> _Parts:
        """By what each unit can do to the linear bounds of the rows that are open: at a share 1 / budget of what is
        left of one without any possible unit it is a danger."""
        values, gains = self.ball.effects(bound.forms, region.images)
        safe = values + bound.constants + self.offsets[parts.image]
        safe = safe + torch.where(parts.free.unsqueeze(1), gains, 0).sum(2)
        harm = gains.neg() / safe.clamp(min=1e-6 * (1 + safe.abs())).unsqueeze(2)
        harm = torch.where((parts.rows > 0).unsqueeze(2), 0, harm).nan_to_num(torch.inf, torch.inf, 0).amax(1)
        harm = torch.where(parts.possible, harm, -1.0)
        rank = harm.argsort(dim=1, descending=True, stable=True).argsort(dim=1).int()
        first = (harm * parts.budget.unsqueeze(1) >= 1).sum(1).clamp(max=MOST)
        first = torch.minimum(first.clamp(min=1), parts.possible.sum(1))
        return _Parts(parts.image, parts.free, parts.possible, parts.budget, parts.rows, rank, first)

    def _try(self, parts: _Parts, region: SparsePart, bound: LinearBound, open_: Tensor) -> None:
        """Where the linear bound of an open subproblem's worst row is smallest."""
        index = open_.nonzero().flatten()
        if not len(index):
            return
        row = parts.rows[index].argmin(1)
        points = region.take(index).minimiser(bound.forms[index, row]).to(self.problem.region.images.dtype)
        specification = self.problem.specification.subset(parts.image[index])
        outputs = self.known.network(points.to(self.known.rows.dtype))
        wrong = ~(specification.worst(specification.values(outputs)) > 0)
        for number in wrong.nonzero().flatten().tolist():
            self._refuted(int(parts.image[index[number]]), points[number])

    def _refuted(self, image: int, point: Tensor) -> bool:
        if self.counterexamples[image] is None and self.violates(image, point):
            self.counterexamples[image] = point
            self._drop({image})
        return self.counterexamples[image] is not None

    def _solve(self, leaves: _Parts) -> None:
        """Boxes, one for each leaf. One that stays undecided leaves its image undecided."""
        wanted = self._wanted(leaves.image)
        self._close(leaves.take(~wanted))
        leaves = leaves.take(wanted)
        if not len(leaves):
            return
        problem, image = self.problem, leaves.image
        images = problem.region.images[image]
        free = SparsePart.of(self.ball, images, leaves.free, leaves.possible, leaves.budget).free
        box = Box(torch.where(free, 0, images), torch.where(free, 1, images))
        boxes = Problem(problem.network, box, problem.specification.subset(image), problem.index[image])
        known = Known(self.known.network, leaves.rows, {})
        of = image.tolist()
        timeout = min((self.timeout - float(self.seconds[i])) / of.count(i) for i in set(of))
        found = self._solved(boxes, known, max(timeout, 0.0), lambda number, point: self._refuted(of[number], point))
        bound = torch.maximum(self._worst(leaves), found.lower.to(self.lower.dtype))
        self.lower.scatter_reduce_(0, image, bound, "amin")
        for number, i in enumerate(of):
            if not found.proved[number]:
                self._give_up({i}, found.reasons[number] or "leaf", at_once=True)

    def _solved(self, boxes: Problem, known: Known, timeout: float, violates: Callable[[int, Tensor], bool]) -> Outcome:
        wide = int((boxes.region.hull.radius > 0).flatten(1).sum(1).max())
        if wide <= INPUTS or not known.network.piecewise_linear:
            return split_inputs(boxes, known, timeout, violates)
        known = known.with_bounds(crown_bounds(known.network, known.region_of(boxes)))
        careful = known.network.rounding is not None
        exact = fold(boxes.network, boxes.region.images.shape[1:], dtype=torch.float64, as_written=careful)
        return branch_and_bound(boxes, known, exact, self.search, timeout, violates)

    def _wanted(self, image: Tensor) -> Tensor:
        over = [c is not None or r is not None for c, r in zip(self.counterexamples, self.reasons, strict=True)]
        return ~torch.tensor(over, dtype=torch.bool, device=image.device)[image]

    def _close(self, parts: _Parts) -> None:
        self.lower.scatter_reduce_(0, parts.image, self._worst(parts).to(self.lower.dtype), "amin")

    def _give_up(self, images: set[int], reason: str, at_once: bool = False) -> None:
        for image in images:
            unfinished = at_once or bool((self.open.image == image).any())
            if unfinished and self.counterexamples[image] is None and self.reasons[image] is None:
                self.reasons[image] = reason
        self._drop({image for image in images if self.reasons[image] is not None})

    def _drop(self, images: set[int]) -> None:
        """Without an image's subproblems; what is left open bounds it."""
        gone = torch.zeros(len(self.problem), dtype=torch.bool, device=self.open.image.device)
        gone[list(images)] = True
        gone = gone[self.open.image]
        self._close(self.open.take(gone))
        self.open = self.open.take(~gone)
