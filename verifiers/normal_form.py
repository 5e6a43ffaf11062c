"""Normal form of a constraint: boxes of inputs, each with clauses of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeAlias

import torch

from ..bounds.clock import looking
from .constraints import CONSTANT, Conjunction, Inequality, Literals
from .vnnlib import Case, Property
from .vnnlib_text import Token, VnnlibText

DISJUNCTS = 1_000_000
SIZE = 20_000_000  # most comparisons of a normal form, and most entries of the tensors made from it


class _End(NamedTuple):
    """X >= value, or <=, without equality where ``strict``; ``rounded`` is the value rounded outward."""

    token: Token
    value: Fraction
    strict: bool
    rounded: float


class _Row(NamedTuple):
    """A linear form that is <= 0, or < 0 where ``strict``: coefficients by variable, and the constant by CONSTANT."""

    form: Mapping[int, float]
    strict: bool


_Place: TypeAlias = tuple[int, bool]  # an input, and whether it is its upper end
_Box: TypeAlias = dict[_Place, _End]


@dataclass(frozen=True)
class Variables:
    """The variables of a property: ``inputs`` of them, then ``outputs``; ``declared`` gives a variable's name, and the
    line where it is declared."""

    inputs: int
    outputs: int
    declared: Callable[[int], Token]


def normal_form(source: VnnlibText, constraint: Conjunction, variables: Variables) -> Property:
    """The property whose unsafe set is where the constraint holds.

    Disjuncts whose boxes differ from the shared one in the same way become one case. A disjunct without rows gets a row
    of zeros, which always holds; one with an empty box is left out, with a remark.

    Args:
        constraint: the assertions; its token stands for the whole file in errors.
    Raises:
        InputError: too many disjuncts; numbers beyond float64; an input without a lower or upper end in a disjunct.
    """
    return _NormalForm(source, variables).build(constraint)


class _NormalForm:
    def __init__(self, source: VnnlibText, variables: Variables):
        self.source, self.variables = source, variables
        self.parts: dict[Inequality, tuple[_Place, _End] | _Row] = {}

    def limit(self, head: Token, disjuncts: int, size: int) -> None:
        if disjuncts > DISJUNCTS or size > SIZE:
            accepted = f"at most {DISJUNCTS} disjuncts, and {SIZE} literals or numbers in all of them"
            self.source.refuse(head, accepted)

    def build(self, constraint: Conjunction) -> Property:
        shared, alternatives = constraint.factored(self.limit)
        box, rows = self._tightest(shared, {}), self._rows(shared)
        groups: dict[frozenset[tuple[_Place, Fraction, bool]], tuple[_Box, list[list[_Row]]]] = {}
        for literals in looking(alternatives):
            own = self._tightest(literals, box)
            key = frozenset((place, end.value, end.strict) for place, end in own.items())
            groups.setdefault(key, (own, []))[1].append(self._rows(literals))
        inputs, outputs = self.variables.inputs, self.variables.outputs
        read = {variable for part in self.parts.values() if isinstance(part, _Row) for variable in part.form}
        tied = tuple(sorted(variable for variable in read if 0 <= variable < inputs))
        lengths = sum(len(rows) + len(clause) for _, clauses in groups.values() for clause in clauses)
        size = lengths * (outputs + len(tied)) + 2 * inputs * len(groups)
        self.limit(constraint.token, len(alternatives), size)
        cases, remark = list[Case](), None if groups else "no input satisfies the asserts"
        for own, clauses in groups.values():
            self._check_bounded(box | own)
            crossed = self._crossed(box | own)
            if crossed is None:
                cases.append(self._case(box | own, [rows + clause or [_Row({}, False)] for clause in clauses], tied))
            remark = remark or crossed
        return Property(tuple(cases), tied, remark)

    def _part(self, literal: Inequality) -> tuple[_Place, _End] | _Row:
        """A comparison as the end of an input, or else as a row."""
        if literal not in self.parts:
            (variable, factor), *others = literal.coefficients
            try:
                if others or variable >= self.variables.inputs:
                    form = {variable: float(factor) for variable, factor in literal.coefficients}
                    self.parts[literal] = _Row({**form, CONSTANT: float(literal.constant)}, literal.strict)
                else:
                    value, upper = -literal.constant / factor, factor > 0
                    end = outward64(value, math.inf if upper else -math.inf)
                    self.parts[literal] = (variable, upper), _End(literal.token, value, literal.strict, end)
            except OverflowError:
                self.source.refuse(literal.token, "coefficients and ends of float64's range")
        return self.parts[literal]

    def _rows(self, literals: Literals) -> list[_Row]:
        return [part for part in map(self._part, literals) if isinstance(part, _Row)]

    def _tightest(self, literals: Literals, known: _Box) -> _Box:
        """The tightest ends among the literals, where these are tighter than those in ``known``."""
        box: _Box = {}
        for part in map(self._part, literals):
            if not isinstance(part, _Row):
                place, end = part
                other = box.get(place, known.get(place))
                if other is None or _tighter(end, other, place[1]):
                    box[place] = end
        return box

    def _check_bounded(self, box: _Box) -> None:
        for i in range(self.variables.inputs):
            if not {(i, False), (i, True)} <= box.keys():
                accepted = "an input that has a lower and an upper end in every disjunct"
                self.source.refuse(self.variables.declared(i), accepted)

    def _crossed(self, box: _Box) -> str | None:
        """Why no input lies in a box; None where one does."""
        for i in range(self.variables.inputs):
            lower, upper = box[i, False], box[i, True]
            if lower.value > upper.value or (lower.value == upper.value and (lower.strict or upper.strict)):
                line = max(lower.token.line, upper.token.line)
                above, below = ">" if lower.strict else ">=", "<" if upper.strict else "<="
                found = f"{above} {float(lower.value)!r} and {below} {float(upper.value)!r}"
                return f"{self.source.path}, line {line}: an empty box: {self.variables.declared(i).text} {found}"
        return None

    def _case(self, box: _Box, clauses: list[list[_Row]], tied: tuple[int, ...]) -> Case:
        inputs, outputs = self.variables.inputs, self.variables.outputs
        columns = [*range(inputs, inputs + outputs), *tied, CONSTANT]
        rows = [row for clause in clauses for row in clause]
        table = torch.tensor([[row.form.get(column, 0.0) for column in columns] for row in rows], dtype=torch.float64)
        numbers = torch.tensor([number for number, clause in enumerate(clauses) for _ in clause])
        pairs = [(box[i, False], box[i, True]) for i in range(inputs)]
        ends = torch.tensor([(lower.rounded, upper.rounded) for lower, upper in pairs], dtype=torch.float64)
        exact = tuple((lower.value, upper.value) for lower, upper in pairs)
        excluded = frozenset(place for place, end in box.items() if end.strict)
        strict = frozenset(number for number, row in enumerate(rows) if row.strict)
        return Case(ends[:, 0], ends[:, 1], exact, table[:, :-1], table[:, -1], numbers, excluded, strict)


def _tighter(end: _End, other: _End, upper: bool) -> bool:
    """Whether an end cuts off more than another one of the same side."""
    if end.value == other.value:
        return end.strict and not other.strict
    return end.value < other.value if upper else end.value > other.value


def outward64(value: Fraction, direction: float) -> float:
    """``value`` as float64, rounded in the direction of ±inf."""
    near = float(value)  # to nearest
    return math.nextafter(near, direction) if (near > value if direction < 0 else near < value) else near
