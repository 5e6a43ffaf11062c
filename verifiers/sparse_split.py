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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bounds import Bounds, Box
from ..bounds.crown import LinearBound, backward, crown_bounds, relax_all, rows_at_a_time
from ..bounds.folding import fold
from ..bounds.sparse import SparseBall
from ..bounds.sparse_part import SparsePart
from .bounds_so_far import BoundsSoFar
from .engine import (
    Bounded,
    Bounder,
    BranchAndBound,
    ImageProgress,
    LeafSolver,
    OpenSubproblems,
    Outcome,
    SolverResult,
    Splitter,
    Violates,
)
from .input_split import INPUTS, split_inputs
from .neuron_split import split_neurons
from .optimise import finite, with_offsets
from .problem import Problem
from .search import Search
from .search_record import Concretised, Proof, Searched, SearchRecord, UnitsLeft

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
    known: BoundsSoFar,
    search: Search,
    timeout: float,
    violates: Violates,
    batch: int = BATCH,
    record: SearchRecord | None = None,
) -> Outcome:
    """Prove or refute what ``known`` leaves open of problems over sparse sets.

    Args:
        search: how leaves of many inputs go through branch and bound on neurons.
        timeout, violates, record: as in ``BranchAndBound``.
        batch: subproblems that are bounded in one round, at most.
    """
    ball = sparse_ball(problem)
    assert ball is not None
    bounder = PartBounder(problem, known, ball, batch)
    leaf = FreeUnitsSolver(problem, known, ball, search, recording=record is not None)
    return BranchAndBound(
        problem, known.network, problem.specification.worst(known.rows).unsqueeze(1), _roots(problem, known, ball),
        bounder, UnitSplitter(ball, max(1, bounder.at_a_time // 8)), leaf,
        timeout=timeout, violates=violates, record=record,
    ).run()  # fmt: skip


@dataclass(frozen=True)
class SparseSubproblems(OpenSubproblems):
    """Subproblems in which some units are free, and few of others may change.

    ``free``, ``possible`` (P, N) bool, by units; ``budget`` (P,); ``rows`` (P, R) lower bounds; ``rank`` (P, N) which
    units to split at first, and at how many, ``first`` (P,).
    """

    free: Tensor
    possible: Tensor
    budget: Tensor
    rows: Tensor
    rank: Tensor
    first: Tensor

    def settled(self) -> SparseSubproblems:
        """With units that may all change free, and none possible without a budget."""
        every = (self.budget >= self.possible.sum(1)).unsqueeze(1)
        free = self.free | (self.possible & every)
        possible = self.possible & ~every & (self.budget > 0).unsqueeze(1)
        budget = torch.where(possible.any(1), self.budget, 0)
        return replace(self, free=free, possible=possible, budget=budget)


def _roots(problem: Problem, known: BoundsSoFar, ball: SparseBall) -> SparseSubproblems:
    images, device = known.region_of(problem).images, known.rows.device
    count, units = len(problem), ball.units(images.shape[1:])
    none = torch.zeros(count, units, dtype=torch.bool, device=device)
    k = ball.counts(images)
    budget = k if isinstance(k, Tensor) else torch.full((count,), min(k, units), device=device)
    place = torch.arange(units, dtype=torch.int32, device=device).expand(count, -1)
    number = torch.arange(count, device=device)
    return SparseSubproblems(
        number, number * 0, problem.specification.worst(known.rows), number * 0 - 1, none, ~none,
        budget.clamp(max=units), known.rows, place, budget * 0,
    ).settled()  # fmt: skip


@dataclass(frozen=True, eq=False)
class PartBounds(Bounded[SparseSubproblems]):
    """Linear bounds of the specification's rows over parts of sparse sets; ``offsets`` (P, R)."""

    problem: Problem
    region: SparsePart
    linear: LinearBound
    offsets: Tensor

    def points(self, index: Tensor) -> Iterator[Tensor]:
        """Where the linear bound of the worst row is smallest."""
        row = self.subproblems.rows[index].argmin(1)
        point = self.region.take(index).minimiser(self.linear.forms[index, row])
        yield point.to(self.problem.region.images.dtype)

    def proof(self, number: int) -> Proof:
        clauses, rows = self.problem.specification.clauses, self.subproblems.rows[number]
        each = torch.arange(int(clauses.max()) + 1, device=clauses.device).unsqueeze(1)
        best = torch.where(clauses == each, rows, -torch.inf).argmax(1, keepdim=True)
        return Concretised(torch.zeros_like(rows).expand(len(each), -1).scatter(1, best, 1.0))


class PartBounder(Bounder[SparseSubproblems, PartBounds]):
    """
    Args:
        batch: subproblems that are bounded together, at most.
    """

    def __init__(self, problem: Problem, known: BoundsSoFar, ball: SparseBall, batch: int):
        self.problem, self.known, self.ball = problem, known, ball
        self.images = known.region_of(problem).images
        self.forms, self.offsets = known.rows_of(problem.specification)
        self._at_a_time = max(1, min(batch, rows_at_a_time(known.network, self.forms.shape[1], known.rows)))

    @property
    def at_a_time(self) -> int:
        return self._at_a_time

    def bound(self, subproblems: SparseSubproblems) -> PartBounds:
        network, some, image = self.known.network, subproblems, subproblems.image
        region = SparsePart.of(self.ball, self.images[image], some.free, some.possible, some.budget)
        given = {place: Bounds(b.lower[image], b.upper[image]) for place, b in self.known.bounds.items()}
        lines = relax_all(network, crown_bounds(network, region, given or None))
        linear = backward(network, len(network.operations) - 1, self.forms[image], lines)
        found = with_offsets(network, linear.lower(region), self.offsets[image])
        rows = torch.maximum(some.rows, finite(found))
        some = replace(some, rows=rows, bound=self.problem.specification.worst(rows))
        return PartBounds(some, self.problem, region, linear, self.offsets[image])


class UnitSplitter(Splitter[SparseSubproblems, PartBounds]):
    def __init__(self, ball: SparseBall, at_a_time: int):
        self.ball, self._at_a_time = ball, at_a_time

    @property
    def at_a_time(self) -> int:
        return self._at_a_time

    def options(self, bounded: PartBounds) -> Tensor:
        """(P, N), by what each unit can do to the linear bounds of the rows that are open: at a share 1 / budget of
        what is left of one without any possible unit it is a danger."""
        some = bounded.subproblems
        values, gains = self.ball.effects(bounded.linear.forms, bounded.region.images)
        safe = values + bounded.linear.constants + bounded.offsets
        safe = safe + torch.where(some.free.unsqueeze(1), gains, 0).sum(2)
        harm = gains.neg() / safe.clamp(min=1e-6 * (1 + safe.abs())).unsqueeze(2)
        harm = torch.where((some.rows > 0).unsqueeze(2), 0, harm).nan_to_num(torch.inf, torch.inf, 0).amax(1)
        return torch.where(some.possible, harm, -torch.inf)

    def decide(self, bounded: PartBounds, options: Tensor, index: Tensor) -> SparseSubproblems:
        some, harm = bounded.subproblems.take(index), options[index]
        rank = harm.argsort(dim=1, descending=True, stable=True).argsort(dim=1).int()
        first = (harm * some.budget.unsqueeze(1) >= 1).sum(1).clamp(max=MOST)
        first = torch.minimum(first.clamp(min=1), some.possible.sum(1))
        return replace(some, rank=rank, first=first)

    def children(self, parents: SparseSubproblems) -> SparseSubproblems:
        """For each of the ``first`` units that it changes and those before it do not; and that none of them does."""
        count = parents.first + 1
        index = torch.arange(len(parents), device=count.device).repeat_interleave(count)
        number = torch.arange(len(index), device=count.device) - (count.cumsum(0) - count)[index]
        parts, number = parents.take(index), number.unsqueeze(1)
        chosen = (parts.rank == number) & (number < parts.first.unsqueeze(1))
        before = torch.minimum(number, parts.first.unsqueeze(1) - 1)
        budget = parts.budget - chosen.any(1).long()
        possible = parts.possible & (parts.rank > before)
        return replace(parts, free=parts.free | chosen, possible=possible, budget=budget).settled()

    def decisions(self, children: SparseSubproblems) -> Sequence[UnitsLeft]:
        return [
            UnitsLeft(tuple(free.nonzero().flatten().tolist()), tuple(possible.nonzero().flatten().tolist()), budget)
            for free, possible, budget in zip(children.free, children.possible, children.budget.tolist())
        ]


class FreeUnitsSolver(LeafSolver[SparseSubproblems, PartBounds]):
    """Leaves, in which the free units alone may change, are boxes: split at their inputs or at neurons. One that stays
    undecided leaves its image undecided."""

    ends_search = True

    def __init__(self, problem: Problem, known: BoundsSoFar, ball: SparseBall, search: Search, recording: bool):
        self.problem, self.known, self.ball, self.search = problem, known, ball, search
        self.recording = recording

    def solve(self, bounded: PartBounds, index: Tensor, leaf: Tensor, progress: ImageProgress) -> SolverResult:
        problem, leaves = self.problem, bounded.subproblems.take(index)
        image, images = leaves.image, problem.region.images[leaves.image]
        free = SparsePart.of(self.ball, images, leaves.free, leaves.possible, leaves.budget).free
        box = Box(torch.where(free, 0, images), torch.where(free, 1, images))
        boxes = Problem(problem.network, box, problem.specification.subset(image), problem.index[image])
        of = image.tolist()
        timeout = max(0.0, min(progress.time_left(i) / of.count(i) for i in set(of)))
        record = SearchRecord() if self.recording else None
        known = BoundsSoFar(self.known.network, leaves.rows, {})
        found = self._searched(
            boxes, known, timeout, lambda number, point: progress.refute(of[number], point), record
        )  # fmt: skip
        proved = found.proved.tolist()
        undecided = [None if done else why or "leaf" for done, why in zip(proved, found.reasons, strict=True)]
        proofs = [Searched(record, place) if record and done else None for place, done in enumerate(proved)]
        return SolverResult(found.lower, undecided, proofs)

    def _searched(
        self, boxes: Problem, known: BoundsSoFar, timeout: float, violates: Violates, record: SearchRecord | None
    ) -> Outcome:
        wide = int((boxes.region.hull.radius > 0).flatten(1).sum(1).max())
        if wide <= INPUTS or not known.network.piecewise_linear:
            return split_inputs(boxes, known, timeout, violates, record=record)
        known = known.with_bounds(crown_bounds(known.network, known.region_of(boxes)))
        careful = known.network.rounding is not None
        exact = fold(boxes.network, boxes.region.images.shape[1:], dtype=torch.float64, as_written=careful)
        return split_neurons(boxes, known, exact, self.search, timeout, violates, record)
