"""The tree of a search, kept for whoever wants to check or write down a proof: decisions, and what closed each leaf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

Reason = Literal["bounded", "infeasible", "leaf", "counterexample", "given up"]
"""Why a subproblem is closed: its linear bound is positive; nothing satisfies its assumptions; a leaf solver proved it;
its image is refuted; or its image, or a leaf itself, stays undecided."""


class Decision:
    """What sets a child apart from its parent."""


@dataclass(frozen=True)
class Sign(Decision):
    """The input of a neuron (its place among the N of ``Neurons``) is assumed >= 0 (1) or <= 0 (-1)."""

    neuron: int
    sign: int


@dataclass(frozen=True)
class Range(Decision):
    """One number of the input (by its place in the flattened image) is in [lower, upper]."""

    input: int
    lower: float
    upper: float


@dataclass(frozen=True)
class UnitsLeft(Decision):
    """The units ``free`` of an image may change, and at most ``budget`` of those ``possible``."""

    free: tuple[int, ...]
    possible: tuple[int, ...]
    budget: int


class Proof:
    """What a positive bound can be computed from again."""

    reason: ClassVar[Reason] = "bounded"


@dataclass(frozen=True, eq=False)
class Relaxed(Proof):
    """A linear bound by weak duality: the specification's row carried backward through lines.

    Args:
        row: of the specification.
        neurons: (U,) int64, the places of the neurons that the image's own bounds leave open.
        lower, upper: (U,) bounds of their inputs in the subproblem, from which the upper lines follow.
        slopes: (U,) of the lower lines; of no effect where a bound is 0 or beyond.
        multipliers: (U,) >= 0 of the constraints -sign · input <= 0; of no effect where no sign is assumed.
    """

    row: int
    neurons: Tensor
    lower: Tensor
    upper: Tensor
    slopes: Tensor
    multipliers: Tensor


@dataclass(frozen=True, eq=False)
class CrossedBounds(Proof):
    """Linear bounds of a neuron's input, each of them valid under the assumptions, that exclude each other."""

    reason: ClassVar[Reason] = "infeasible"
    neuron: int
    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class Multipliers(Proof):
    """A Lagrangian of the leaf's linear program (``lp.leaf_program``): every row is carried backward by itself.

    Args:
        rows: (G,) weights of the clause's rows; all 0 where no point meets the constraints.
        constraints: (M,) multipliers >= 0 of the constraints -sign · input <= 0 of the neurons with an assumed sign, by
            their places.
        neurons, lower, upper: (U,) as in ``Relaxed``; lower lines are CROWN's own.
    """

    reason: ClassVar[Reason] = "leaf"
    rows: Tensor
    constraints: Tensor
    neurons: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True, eq=False)
class Unsatisfiable(Multipliers):
    """A Lagrangian of the constraints alone that is positive."""

    reason: ClassVar[Reason] = "infeasible"


@dataclass(frozen=True, eq=False)
class Concretised(Proof):
    """Linear bounds by CROWN's or by forward lines, with no parameters, at their minimum over the subproblem's set.

    Args:
        rows: (C, G) weights of each clause's rows, those of one clause add up to 1.
    """

    rows: Tensor


@dataclass(frozen=True, eq=False)
class Searched(Proof):
    """Another search, in which the leaf is image number ``image``."""

    reason: ClassVar[Reason] = "leaf"
    record: SearchRecord
    image: int


@dataclass(eq=False)
class RecordedSubproblem:
    """One subproblem of a recorded search.

    Args:
        number: its own; parent: its parent's, None for a root.
        image, goal: as in ``OpenSubproblems``.
        decision: None for a root.
        reason: why it was closed; None while it is open and once it is split.
        bound: at which it was closed.
        proof: for a bound that is positive.
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
        """(P,) int64, the numbers of P new subproblems; ``parent`` (P,) is -1 for a root."""
        first = len(self.subproblems)
        columns = zip(parent.tolist(), image.tolist(), goal.tolist(), decisions, strict=True)
        for number, (above, of, aim, decision) in enumerate(columns, start=first):
            self.subproblems.append(RecordedSubproblem(number, None if above < 0 else above, of, aim, decision))
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
        """The subproblems of an image that were closed."""
        return [one for one in self.subproblems if not one.children and one.image == image]

    def path(self, one: RecordedSubproblem) -> list[RecordedSubproblem]:
        """From the root to a subproblem, both included."""
        found = [one]
        while (parent := found[-1].parent) is not None:
            found.append(self.subproblems[parent])
        return found[::-1]
