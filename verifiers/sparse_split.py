"""Branch and bound on which units of an image change: complete for sparse sets of few units, whatever the network.

A subproblem is a ``SparsePart``: all its free units may change, and at most so many of its possible units. Linear
bounds are minimised exactly over its convex hull (as in arXiv 2511.10576 for a whole l0 ball). A subproblem that is not
proved is split at the units with the largest possible effect, in turn: unit i changes and those before it do not; one
more child has none of them changing. A leaf, in which no choice is left, is a box: halved where few inputs vary,
otherwise split at neurons. Other complete verifiers for few pixels cover the choices by larger sets of pixels, each of
them a box: Calzone (Shapira, Avneri, Drachsler-Cohen, OOPSLA 2023) and CoVerD (arXiv 2405.10924).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bounds import Bounds, Box, memory
from ..bounds.crown import LinearBound, backward_rows, crown_bounds, relax_all, rows_at_a_time
from ..bounds.folding import fold
from ..bounds.sparse import SparseBall
from ..bounds.sparse_part import SparsePart
from ..typed import as_ints
from .bounds_so_far import BoundsSoFar
from .engine import (
    Bounded,
    Bounder,
    BranchAndBound,
    LeafSolver,
    OpenSubproblems,
    SearchOutcome,
    SolverResult,
    Splitter,
)
from .image_progress import ImageProgress, Violates
from .input_split import INPUTS, split_inputs
from .neuron_split import split_neurons
from .optimise import finite, with_offsets
from .problem import Problem
from .search import Search
from .search_record import Concretised, Proof, Searched, SearchRecord, UnitsLeft

BATCH = 512
"""Number of subproblems bounded together."""

MOST = 64
"""Most units at which one subproblem is split; the others wait for the tighter bounds of the last child."""


def sparse_ball(problem: Problem) -> SparseBall | None:
    """The set around each image if it is a ``SparseBall``, else None."""
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
) -> SearchOutcome:
    """Prove or refute the problems over sparse sets that ``known`` leaves open.

    Args:
        search: settings of branch and bound on neurons, for leaves in which many inputs vary.
        timeout, violates, record: as in ``BranchAndBound``.
        batch: most subproblems bounded together.
    """
    ball = sparse_ball(problem)
    assert ball is not None
    bounder = PartBounder(problem, known, ball, batch)
    leaf = FreeUnitsSolver(problem, known, ball, search, recording=record is not None)
    return BranchAndBound(
        problem, known.network, problem.specification.worst(known.rows).unsqueeze(1), _roots(problem, known, ball),
        bounder, UnitSplitter(ball, max(1, bounder.at_a_time // 8)), leaf,
        timeout=timeout, violates=violates, record=record, bounds=known.bounds,
    ).run()  # fmt: skip


@dataclass(frozen=True)
class SparseSubproblems(OpenSubproblems):
    """Subproblems in which some units are free, and a limited number of others may change.

    Args:
        free, possible: (P, N) bool, units that may all change, and units of which at most ``budget`` (P,) may.
        rows: (P, R) lower bounds of the specification's rows.
        rank: (P, N) order in which units are split at; first: (P,) number of units to split at next.
    """

    free: Tensor
    possible: Tensor
    budget: Tensor
    rows: Tensor
    rank: Tensor
    first: Tensor

    def settled(self) -> SparseSubproblems:
        """Simplify: possible units that may all change become free, and without a budget no unit stays possible."""
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
    """Linear bounds of the specification's rows over P parts of sparse sets; ``offsets`` (P, R) are the rows' own."""

    problem: Problem
    region: SparsePart
    linear: LinearBound
    offsets: Tensor

    def points(self, index: Tensor) -> Iterator[Tensor]:
        """The minimisers of the lowest row's linear bound."""
        row = self.subproblems.rows[index].argmin(1)
        point = self.region.take(index).minimiser(self.linear.forms[index, row])
        yield point.to(self.problem.region.images.dtype)

    def targets(self, index: Tensor) -> Tensor:
        return self.problem.specification.clauses[self.subproblems.rows[index].argmin(1)]

    def proof(self, number: int) -> Proof:
        clauses, rows = self.problem.specification.clauses, self.subproblems.rows[number]
        each = torch.arange(int(clauses.max()) + 1, device=clauses.device).unsqueeze(1)
        best = torch.where(clauses == each, rows, -torch.inf).argmax(1, keepdim=True)
        return Concretised(torch.zeros_like(rows).expand(len(each), -1).scatter(1, best, 1.0))


class PartBounder(Bounder[SparseSubproblems, PartBounds]):
    """Bounds parts of sparse sets by CROWN.

    Args:
        batch: most subproblems bounded together.
    """

    def __init__(self, problem: Problem, known: BoundsSoFar, ball: SparseBall, batch: int):
        self.problem, self.known, self.ball = problem, known, ball
        self.images = known.region_of(problem).images
        self.forms, self.offsets = known.forms_of(problem.specification)
        size = memory.planned(known.rows)
        self._at_a_time = max(1, min(batch, rows_at_a_time(known.network, self.forms.shape[1], known.rows, size=size)))

    @property
    def at_a_time(self) -> int:
        return self._at_a_time

    def bound(self, subproblems: SparseSubproblems) -> PartBounds:
        network, some, image = self.known.network, subproblems, subproblems.image
        region = SparsePart.of(self.ball, self.images[image], some.free, some.possible, some.budget)
        given = {place: Bounds(b.lower[image], b.upper[image]) for place, b in self.known.bounds.items()}
        lines = relax_all(network, crown_bounds(network, region, given or None))
        offsets = self.offsets[image]
        linear = backward_rows(network, self.forms.take(image), offsets, lines)
        lower = with_offsets(network, linear.lower(region), offsets)
        rows = torch.maximum(some.rows, finite(lower))
        some = replace(some, rows=rows, bound=self.problem.specification.worst(rows))
        return PartBounds(some, self.problem, region, linear, offsets)


class UnitSplitter(Splitter[SparseSubproblems, PartBounds]):
    """Splits at the units with the largest possible effect on the open rows' linear bounds."""

    def __init__(self, ball: SparseBall, at_a_time: int):
        self.ball, self._at_a_time = ball, at_a_time

    @property
    def at_a_time(self) -> int:
        return self._at_a_time

    def options(self, bounded: PartBounds) -> Tensor:
        """(P, N) effect of each possible unit: the largest share, over the open rows, that it can take from the row's
        linear bound without any possible unit. From a share 1 / budget on, ``decide`` splits at the unit."""
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
        """One child for each of the ``first`` units, in which it changes and those before it do not; and one in which
        none of them changes."""
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
            UnitsLeft(tuple(as_ints(free.nonzero())), tuple(as_ints(possible.nonzero())), budget)
            for free, possible, budget in zip(children.free, children.possible, as_ints(children.budget))
        ]


class FreeUnitsSolver(LeafSolver[SparseSubproblems, PartBounds]):
    """Solves leaves, in which only the free units may change, as boxes: by splitting inputs or neurons. An undecided
    leaf leaves its image undecided."""

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
        numbers = as_ints(image)
        timeout = max(0.0, min(progress.time_left(i) / numbers.count(i) for i in set(numbers)))
        record = SearchRecord() if self.recording else None
        known = BoundsSoFar(self.known.network, leaves.rows, {})
        outcome = self._searched(
            boxes, known, timeout, lambda number, point: progress.refute(numbers[number], point), record
        )  # fmt: skip
        proved = as_ints(outcome.proved)
        undecided = [None if done else why or "leaf" for done, why in zip(proved, outcome.reasons, strict=True)]
        proofs = [Searched(record, place) if record and done else None for place, done in enumerate(proved)]
        return SolverResult(outcome.lower, undecided, proofs)

    def _searched(
        self, boxes: Problem, known: BoundsSoFar, timeout: float, violates: Violates, record: SearchRecord | None
    ) -> SearchOutcome:
        wide = int((boxes.region.hull.radius > 0).flatten(1).sum(1).max())
        if wide <= INPUTS or not known.network.piecewise_linear:
            return split_inputs(boxes, known, timeout, violates, record=record)
        known = known.with_bounds(crown_bounds(known.network, known.region_of(boxes)))
        careful = known.network.rounding is not None
        exact = fold(boxes.network, boxes.region.images.shape[1:], dtype=torch.float64, as_written=careful)
        return split_neurons(boxes, known, exact, self.search, timeout, violates, record)
