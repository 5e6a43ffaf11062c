"""Branch and bound on the input box: for networks of few inputs, as in control, it takes far fewer subproblems than
splitting neurons.

A subproblem is a box, bounded by ``BoxBounds``, clipped to the part in which its linear bounds allow a counterexample,
and halved at the input through which they vary most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bounds import Box, memory
from ..bounds.crown import rows_at_a_time
from ..typed import as_floats, as_ints
from .bounds_so_far import BoundsSoFar
from .box_bounds import BoxBounds, ClauseBounds
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
from .problem import Problem, rows_of_clauses
from .search_record import Clip, Clipped, Concretised, Proof, Range, SearchRecord

INPUTS = 20
"""Most inputs that may vary: with more, half a box is hardly easier than the box. With 14 inputs and 64 ReLUs (the GCAS
properties of VNN-COMP 2022) halving took 0.4 s, splitting neurons more than 30 s."""

FLOOR = 0.1
"""Least slope that every input counts with, relative to the steepest input's: lines may be flat where relaxations are
wide. On ACAS Xu's property 1 networks 2_8 and 3_1 took 889 and 153 boxes with it, and more than 30,000 without."""

BATCH = 512
"""Number of boxes halved in one round."""


def few_inputs(problem: Problem) -> bool:
    """Whether all sets are boxes in which at most ``INPUTS`` inputs vary."""
    wide = (problem.region.hull.radius > 0).flatten(1).sum(1)
    return problem.region.is_box and bool((wide <= INPUTS).all())


def split_inputs(
    problem: Problem,
    known: BoundsSoFar,
    timeout: float,
    violates: Violates,
    batch: int = BATCH,
    record: SearchRecord | None = None,
) -> SearchOutcome:
    """Prove or refute the problems over boxes that ``known`` leaves open.

    Args:
        timeout, violates, record: as in ``BranchAndBound``. A recorded search never tightens the bounds of the whole
            set: the record has no place for the slopes.
        batch: most boxes halved in one round.
    """
    worst, hull = problem.specification.worst(known.rows), known.region_of(problem).hull
    image = torch.arange(len(problem), device=worst.device)
    none = torch.zeros_like(image)
    inf = torch.full_like(worst, torch.inf)
    roots = Boxes(image, none, worst, none - 1, hull.lower, hull.upper, none, inf)
    bounder = BoxBounder(problem, known, batch, tighten=record is None)
    return BranchAndBound(
        problem, known.network, worst.unsqueeze(1), bounder.packed(roots), bounder, BoxSplitter(batch),
        UnsplittableBoxes(), timeout=timeout, violates=violates, record=record, bounds=known.bounds,
    ).run()  # fmt: skip


@dataclass(frozen=True)
class Boxes(OpenSubproblems):
    """Boxes from ``lower`` to ``upper`` (P, *shape), clipped once they are bounded.

    Args:
        cut: (P,) int64, the input to halve them at.
        level: (P,) > 0, lower bounds of the clauses in all that was cut off; inf where nothing was.
    """

    lower: Tensor
    upper: Tensor
    cut: Tensor
    level: Tensor


@dataclass(frozen=True)
class PackedBoxes(OpenSubproblems):
    """Boxes by the ends (P, V) of the inputs that vary in their image's set; the others are those of the set.

    Args:
        cut, level: as in ``Boxes``.
    """

    lower: Tensor
    upper: Tensor
    cut: Tensor
    level: Tensor


@dataclass(frozen=True, eq=False)
class BoxLines(Bounded[Boxes]):
    """Linear bounds of P boxes, before they were clipped.

    Args:
        empty: (P,) bool, the boxes of which clipping left nothing.
    """

    problem: Problem
    linear: ClauseBounds
    empty: Tensor

    def points(self, index: Tensor) -> Iterator[Tensor]:
        """The minimisers of the worst clause's linear bound, then the centres of the boxes."""
        some = self.subproblems.take(index)
        region, own = Box(some.lower, some.upper), self.problem.region.take(some.image)
        form = self.linear.forms[index, self.targets(index)]
        yield own.nearest(torch.where(form > 0, region.lower, torch.where(form < 0, region.upper, region.images)))
        yield own.nearest(region.images)

    def targets(self, index: Tensor) -> Tensor:
        return self.linear.clauses[index].argmin(1)

    def proof(self, number: int) -> Proof:
        weights = self.linear.weights[number]
        return Clipped(weights, self.clip(number)) if bool(self.empty[number]) else Concretised(weights)

    def clip(self, number: int) -> Clip:
        some, cuts = self.subproblems, self.linear.cuts
        lower, upper = (tuple(as_floats(end[number].flatten())) for end in (some.lower, some.upper))
        open_ = tuple(as_ints((~(self.linear.clauses[number] > 0)).nonzero()))
        return Clip(lower, upper, open_, cuts.forms[number].flatten(2), cuts.least[number])


class BoxBounder(Bounder[Boxes, BoxLines]):
    """Bounds boxes by ``BoxBounds``.

    Args:
        batch: most boxes halved in one round.
        tighten: as in ``BoxBounds``.
    """

    def __init__(self, problem: Problem, known: BoundsSoFar, batch: int, tighten: bool = False):
        rows, offsets = known.forms_of(problem.specification)
        members, _ = rows_of_clauses(problem.specification.clauses)
        self.problem, region = problem, known.region_of(problem)
        hull, wide = region.hull, (region.hull.radius > 0).flatten(1)
        most = int(wide.sum(1).max()) if len(wide) else 0
        self.varying = torch.argsort(wide.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]  # (B, V)
        self.lower, self.upper = hull.lower, hull.upper
        self.bounds = BoxBounds(known.network, rows, offsets, members, known.bounds, region, tighten)
        inputs = int((problem.region.hull.radius > 0).flatten(1).any(0).sum())  # that vary in any of the sets
        lines = max(rows.shape[1], 1 + inputs)  # backward, and lower and upper ones forward
        size = memory.planned(known.rows)
        self._at_a_time = min(2 * batch, rows_at_a_time(known.network, lines, known.rows, size=size))

    @property
    def at_a_time(self) -> int:
        return self._at_a_time

    def packed(self, subproblems: Boxes) -> PackedBoxes:
        some, varying = subproblems, self.varying[subproblems.image]
        lower, upper = (end.flatten(1).gather(1, varying) for end in (some.lower, some.upper))
        return PackedBoxes(some.image, some.goal, some.bound, some.node, lower, upper, some.cut, some.level)

    def restored(self, packed: PackedBoxes) -> Boxes:
        some, varying = packed, self.varying[packed.image]
        lower, upper = (
            whole[some.image].flatten(1).scatter(1, varying, end).reshape(len(some), *whole.shape[1:])
            for whole, end in ((self.lower, some.lower), (self.upper, some.upper))
        )
        return Boxes(some.image, some.goal, some.bound, some.node, lower, upper, some.cut, some.level)

    def bound(self, subproblems: Boxes) -> BoxLines:
        box = Box(subproblems.lower, subproblems.upper)
        linear = self.bounds(box, subproblems.image)
        bound = torch.maximum(subproblems.bound, torch.minimum(linear.clauses.amin(1), subproblems.level))
        open_ = ~(bound > 0)
        part = linear.cuts.clipped(box, open_.unsqueeze(1) & ~(linear.clauses > 0))
        empty = part.empty & open_  # the others are proved as they are
        proved = linear.clauses.masked_fill(~(linear.clauses > 0), torch.inf).amin(1)  # there too
        level = torch.minimum(
            subproblems.level, torch.where(part.level < torch.inf, part.level.minimum(proved), torch.inf)
        )
        some = replace(
            subproblems, bound=torch.where(empty, level, bound), lower=part.lower, upper=part.upper, level=level
        )  # fmt: skip
        return BoxLines(some, self.problem, linear, empty)


class BoxSplitter(Splitter[Boxes, BoxLines]):
    """Halves boxes at the input through which the open clauses' linear bounds vary most."""

    def __init__(self, at_a_time: int):
        self._at_a_time = at_a_time
        self._clips: dict[int, Clip] = {}  # of the boxes to be halved, by their numbers in the record

    @property
    def at_a_time(self) -> int:
        return self._at_a_time

    def options(self, bounded: BoxLines) -> Tensor:
        """(P, inputs) variation of the open clauses' bounds; -inf where no float lies between an input's ends."""
        lower, upper = bounded.subproblems.lower.flatten(1), bounded.subproblems.upper.flatten(1)
        middle = _middle(lower, upper)
        splittable = (lower < middle) & (middle < upper)
        linear = bounded.linear
        slope = (linear.forms.flatten(2).abs() * ~(linear.clauses > 0).unsqueeze(-1)).sum(1)
        slope = torch.maximum(slope, FLOOR * slope.amax(1, keepdim=True))
        variation = slope * (upper - lower)
        # a bound that does not vary gives no choice: then the widest input
        return torch.where(splittable, variation.nan_to_num(0.0) + 1e-30 * (upper - lower), -torch.inf)

    def decide(self, bounded: BoxLines, options: Tensor, index: Tensor) -> Boxes:
        some = replace(bounded.subproblems.take(index), cut=options[index].argmax(1))
        self._clips |= {node: bounded.clip(i) for node, i in zip(as_ints(some.node), as_ints(index)) if node >= 0}
        return some

    def children(self, parents: Boxes) -> Boxes:
        lower, upper = parents.lower.flatten(1), parents.upper.flatten(1)
        at = parents.cut.unsqueeze(1)
        middle = _middle(lower.gather(1, at), upper.gather(1, at))
        left = replace(parents, upper=upper.scatter(1, at, middle).reshape(parents.upper.shape))
        return left.joined(replace(parents, lower=lower.scatter(1, at, middle).reshape(parents.lower.shape)))

    def decisions(self, children: Boxes) -> Sequence[Range]:
        at = children.cut.unsqueeze(1)
        lower, upper = (as_floats(end.flatten(1).gather(1, at)) for end in (children.lower, children.upper))
        clips = [self._clips[node] for node in as_ints(children.node)]
        return [Range(*one) for one in zip(as_ints(children.cut), lower, upper, clips)]


class UnsplittableBoxes(LeafSolver[Boxes, BoxLines]):
    """Leaves boxes between neighbouring floats undecided, "within tolerance"."""

    ends_search = True

    def solve(self, bounded: BoxLines, index: Tensor, leaf: Tensor, progress: ImageProgress) -> SolverResult:
        none = torch.full((len(index),), -torch.inf, device=index.device)
        return SolverResult(none, ["within tolerance"] * len(index), [None] * len(index))


def _middle(lower: Tensor, upper: Tensor) -> Tensor:
    return lower + (upper - lower) / 2
