"""Record of a branch-and-bound search, for checking or writing proofs: the decisions, and the proof of each leaf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..typed import as_ints

Reason = Literal["bounded", "infeasible", "leaf", "counterexample", "given up"]
"""Why a subproblem was closed, in this order: its linear bound is positive; nothing satisfies its assumptions; a leaf
solver proved it; its image was refuted; its image was given up, or the leaf itself stayed undecided."""


class Decision:
    """The assumption that a child adds to its parent's."""


@dataclass(frozen=True)
class Sign(Decision):
    """A neuron's input is assumed >= 0 (``sign`` 1) or <= 0 (-1); ``neuron`` is its place among the N of
    ``Neurons``."""

    neuron: int
    sign: int


@dataclass(frozen=True, eq=False)
class Clip:
    """The part of a box that may hold a counterexample, by linear bounds over the box (``clipping.Cuts``).

    Args:
        lower, upper: ends of all N inputs.
        clauses: numbers of the clauses that are not proved over the box.
        forms: (C, K, N), linear lower bounds of rows of each clause and of weighted means of its rows, constants left
            out; least: (C, K), lower bounds of their minima over the box, constants included.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    clauses: tuple[int, ...]
    forms: Tensor
    least: Tensor


@dataclass(frozen=True, eq=False)
class Range(Decision):
    """The parent's box is clipped, and one of its inputs, by its place in the flattened image, is in [lower, upper]."""

    input: int
    lower: float
    upper: float
    clip: Clip


@dataclass(frozen=True)
class UnitsLeft(Decision):
    """All units in ``free`` may change, and at most ``budget`` of those in ``possible``."""

    free: tuple[int, ...]
    possible: tuple[int, ...]
    budget: int


class Proof:
    """Data from which a positive bound can be recomputed."""

    reason: ClassVar[Reason] = "bounded"


@dataclass(frozen=True, eq=False)
class Relaxed(Proof):
    """A linear bound by weak duality: one row of the specification carried backward through relaxations.

    Args:
        row: number of the specification's row.
        neurons: (U,) int64, places of the neurons that are unstable under the image's own bounds.
        lower, upper: (U,) bounds of their inputs in the subproblem, which determine the upper lines.
        slopes: (U,) slopes of the lower lines; without effect where the bounds do not cross 0.
        multipliers: (U,) >= 0, multipliers of the constraints -sign · input <= 0; without effect where no sign is
            assumed.
    """

    row: int
    neurons: Tensor
    lower: Tensor
    upper: Tensor
    slopes: Tensor
    multipliers: Tensor


@dataclass(frozen=True, eq=False)
class CrossedBounds(Proof):
    """Bounds ``lower`` > ``upper`` of one neuron's input, both valid under the assumptions, so that these are
    infeasible."""

    reason: ClassVar[Reason] = "infeasible"
    neuron: int
    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class Multipliers(Proof):
    """A Lagrangian of the leaf's linear program (``lp.leaf_program``), whose rows are carried backward separately.

    Args:
        rows: (G,) weights of the clause's rows; all 0 where no point meets the constraints.
        constraints: (M,) >= 0, multipliers of the constraints -sign · input <= 0, in the order of the places of the
            neurons with an assumed sign.
        neurons, lower, upper: (U,) as in ``Relaxed``; the lower lines are CROWN's.
    """

    reason: ClassVar[Reason] = "leaf"
    rows: Tensor
    constraints: Tensor
    neurons: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True, eq=False)
class Unsatisfiable(Multipliers):
    """A positive Lagrangian of the constraints alone, which proves them infeasible."""

    reason: ClassVar[Reason] = "infeasible"


@dataclass(frozen=True, eq=False)
class Concretised(Proof):
    """Linear bounds by CROWN or forward lines, without parameters, minimised over the subproblem's set.

    Args:
        rows: (C, G) weights of each clause's rows, which add up to 1 for each clause.
    """

    rows: Tensor


@dataclass(frozen=True, eq=False)
class Clipped(Concretised):
    """Linear bounds that exclude a counterexample of any clause: some are positive, those of each other clause leave
    nothing of the box.

    Args:
        clip: its ends are those of the whole box.
    """

    reason: ClassVar[Reason] = "infeasible"
    clip: Clip


@dataclass(frozen=True, eq=False)
class Searched(Proof):
    """A leaf proved by another search, in whose ``record`` it is image number ``image``."""

    reason: ClassVar[Reason] = "leaf"
    record: SearchRecord
    image: int


@dataclass(eq=False)
class RecordedSubproblem:
    """One subproblem of a recorded search.

    Args:
        number: its number in the record; parent: its parent's number, None for a root.
        image, goal: as in ``OpenSubproblems``.
        decision: the assumption added to the parent's; None for a root.
        reason: why it was closed; None while it is open and after it was split.
        bound: its lower bound when it was closed.
        proof: the proof of a positive bound; None otherwise.
        children: numbers of its children.
    """

    number: int
    parent: int | None
    image: int
    goal: int
    decision: Decision | None
    reason: Reason | None = None
    bound: float | None = None
    proof: Proof | None = None
    children: list[int] = field(default_factory=list[int])


class SearchRecord:
    """The subproblems of one search, by number, parents before children."""

    def __init__(self) -> None:
        self.subproblems: list[RecordedSubproblem] = []

    def add(self, parent: Tensor, image: Tensor, goal: Tensor, decisions: Sequence[Decision | None]) -> Tensor:
        """Add P subproblems and return their numbers (P,) int64; ``parent`` (P,) is -1 for a root."""
        first = len(self.subproblems)
        columns = zip(as_ints(parent), as_ints(image), as_ints(goal), decisions, strict=True)
        for number, (above, own, aim, decision) in enumerate(columns, start=first):
            self.subproblems.append(RecordedSubproblem(number, None if above < 0 else above, own, aim, decision))
            if above >= 0:
                self.subproblems[above].children.append(number)
        return torch.arange(first, len(self.subproblems), device=image.device)

    def close(self, number: int, bound: float, reason: Reason, proof: Proof | None) -> None:
        one = self.subproblems[number]
        assert one.reason is None and not one.children
        one.bound, one.reason, one.proof = bound, reason, proof

    def roots(self, image: int) -> list[RecordedSubproblem]:
        return [one for one in self.subproblems if one.parent is None and one.image == image]

    def leaves(self, image: int) -> list[RecordedSubproblem]:
        """The subproblems of an image without children."""
        return [one for one in self.subproblems if not one.children and one.image == image]

    def path(self, one: RecordedSubproblem) -> list[RecordedSubproblem]:
        """The subproblems from the root to ``one``, both included."""
        upward = [one]
        while (parent := upward[-1].parent) is not None:
            upward.append(self.subproblems[parent])
        return upward[::-1]
