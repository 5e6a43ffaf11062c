"""Normal form of a constraint: boxes of inputs, each with clauses of rows.

Equalities among inputs that all disjuncts share are solved first; boxes and rows are then of the inputs that stay free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple, TypeAlias

import torch

from ..bounds.clock import looking
from .constraints import CONSTANT, Conjunction, Inequality, Limit, Literals, Monomial, Term
from .free_inputs import Equalities, FreeInputs
from .onnx_scores import Index, scores_compared
from .vnnlib import Case, Property
from .vnnlib_text import Token, VnnlibText

NONE = "no input satisfies the asserts"

DISJUNCTS = 1_000_000
SIZE = 20_000_000  # most comparisons of a normal form, and most entries of the tensors made from it


class _End(NamedTuple):
    """X >= value, or <=, without equality where ``strict``; ``rounded`` is the value rounded outward."""

    token: Token
    value: Fraction
    strict: bool
    rounded: float


_Direction: TypeAlias = frozenset[tuple[Monomial, Fraction]]
"""Coefficients, of which that of the first monomial is 1 or -1."""


class _Row(NamedTuple):
    """A comparison of the file, and its polynomial in free inputs and outputs, with coefficients rounded to nearest and
    the constant rounded down; without monomials where it is decided: ``never`` says that it does not hold then.
    Exactly, it is direction + level <= 0, or < 0.
    """

    literal: Inequality
    form: Mapping[Monomial, float]
    never: bool = False
    direction: _Direction = frozenset()
    level: Fraction = Fraction(0)

    @property
    def opposite(self) -> _Direction:
        return frozenset((monomial, -factor) for monomial, factor in self.direction)

    def follows_from(self, other: _Row) -> bool:
        """Whether the comparison holds where another one of the same direction does."""
        if self.level == other.level:
            return other.literal.strict or not self.literal.strict
        return self.level < other.level

    def excludes(self, other: _Row) -> bool:
        """Whether it holds nowhere where one of the opposite direction does."""
        gap = self.level + other.level
        return gap > 0 or (gap == 0 and (self.literal.strict or other.literal.strict))


ALWAYS = _Row(Inequality(Token("true", 1), (), Fraction(0), False), {})


_Place: TypeAlias = tuple[int, bool]  # an input, and whether it is its upper end
_Box: TypeAlias = dict[_Place, _End]


@dataclass(frozen=True)
class Variables:
    """The variables of a property: ``inputs`` of them, then ``outputs``; ``declared`` gives a variable's name, and the
    line where it is declared; ``indices`` are the outputs, by their numbers, for which the program gives scores."""

    inputs: int
    outputs: int
    declared: Callable[[int], Token]
    indices: Mapping[int, Index] = field(default_factory=dict[int, Index])

    def compared(self, constraint: Conjunction, limit: Limit) -> tuple[Conjunction, Variables]:
        """The constraint on the program's inputs and outputs, which are its variables."""
        if not self.indices:
            return constraint, self
        outputs = self.outputs + sum(index.size - 1 for index in self.indices.values())
        found = scores_compared(constraint, self.inputs, self.outputs, self.indices, limit)
        return found, Variables(self.inputs, outputs, self.declared)


def normal_form(source: VnnlibText, constraint: Conjunction, variables: Variables) -> Property:
    """The property whose unsafe set is where the constraint holds.

    Disjuncts whose boxes differ from the shared one in the same way become one case. A disjunct without rows gets a row
    of zeros, which always holds. One with an empty box, or with a comparison that cannot hold where inputs are equal as
    asserted, is left out, with a remark; one with two comparisons that exclude each other, such as a < b and a >= b,
    without.

    Args:
        constraint: the assertions; its token stands for the whole file in errors.
    Raises:
        InputError: too many disjuncts; numbers beyond float64; an input without a lower or upper end in a disjunct.
    """
    constraint, variables = variables.compared(constraint, _NormalForm(source, variables).limit)
    return _NormalForm(source, variables).build(constraint)


class _NormalForm:
    def __init__(self, source: VnnlibText, variables: Variables):
        self.source, self.variables = source, variables
        self.parts: dict[Inequality, tuple[_Place, _End] | _Row] = {}
        self.equalities = Equalities()
        self.inputs: Sequence[int] = range(variables.inputs)
        """The free inputs' numbers among the variables."""
        self.places: Mapping[int, int] = {}
        """The numbers of free inputs and outputs among those of the program, where they differ from the variables'."""

    def limit(self, head: Token, disjuncts: int, size: int) -> None:
        if disjuncts > DISJUNCTS or size > SIZE:
            accepted = f"at most {DISJUNCTS} disjuncts, and {SIZE} literals or numbers in all of them"
            self.source.refuse(head, accepted)

    def build(self, constraint: Conjunction) -> Property:
        shared, alternatives = constraint.factored(self.limit)
        free = self._solve(shared)
        box, rows, remark = self._tightest(shared, {}), self._rows(shared, {}), self._never(shared)
        if rows is None or remark is not None:
            return Property((), remark=remark or NONE)
        known = {row.direction: row for row in rows}
        groups: dict[frozenset[tuple[_Place, Fraction, bool]], tuple[_Box, list[list[_Row]]]] = {}
        for literals in looking(alternatives):
            never, clause = self._never(literals), self._rows(literals, known)
            remark = remark or never
            if never is None and clause is not None:
                own = self._tightest(literals, box)
                key = frozenset((place, end.value, end.strict) for place, end in own.items())
                groups.setdefault(key, (own, []))[1].append(clause)
        inputs, outputs = len(self.inputs), self.variables.outputs
        read = {monomial for part in self.parts.values() if isinstance(part, _Row) for monomial in part.form}
        own_columns = {CONSTANT, *((output,) for output in range(inputs, inputs + outputs))}
        terms = tuple(sorted(read - own_columns, key=lambda one: (len(one), len(set(one)) < len(one), one)))
        lengths = sum(len(rows) + len(clause) for _, clauses in groups.values() for clause in clauses)
        size = lengths * (outputs + len(terms)) + 2 * inputs * len(groups)
        self.limit(constraint.token, len(alternatives), size)
        cases = list[Case]()
        remark = remark if groups or remark else NONE
        for own, clauses in groups.values():
            self._check_bounded(box | own)
            crossed = self._crossed(box | own)
            if crossed is None:
                common = len(rows) if len(clauses) > 1 else len(rows) + len(clauses[0])
                cases.append(self._case(box | own, [rows + clause or [ALWAYS] for clause in clauses], terms, common))
            remark = remark or crossed
        return Property(tuple(cases), terms, free, remark)

    def _solve(self, shared: Literals) -> FreeInputs | None:
        """Solve the equalities among inputs that all disjuncts share; None without any."""
        count, met = self.variables.inputs, set[tuple[frozenset[tuple[Monomial, Fraction]], Fraction]]()
        equalities = list[Term]()
        for literal in shared:
            short = len(literal.coefficients) * count <= SIZE
            if (
                not short
                or literal.strict
                or not all(len(one) == 1 and one[0] < count for one, _ in literal.coefficients)
            ):
                continue
            size = abs(literal.coefficients[0][1])
            coefficients = [(one, factor / size) for one, factor in literal.coefficients]
            opposite = frozenset((one, -factor) for one, factor in coefficients), -literal.constant / size
            if opposite in met:
                equalities.append({**dict(literal.coefficients), CONSTANT: literal.constant})
            met.add((frozenset(coefficients), literal.constant / size))
        solved = Equalities(equalities)
        longest = max((len(solved.resolved({(number,): Fraction(1)})) for number in range(count)), default=0)
        if not len(solved) or longest * count > SIZE:  # too long ones stay rows
            return None
        self.equalities = solved
        self.inputs = [number for number in range(count) if number not in self.equalities]
        places = [*self.inputs, *range(count, count + self.variables.outputs)]
        self.places = {number: place for place, number in enumerate(places)}
        terms = tuple(self._resolved({(number,): Fraction(1)}) for number in range(count))
        return FreeInputs(terms, len(self.inputs))

    def _resolved(self, term: Mapping[Monomial, Fraction]) -> Term:
        """A term of the variables in free inputs and outputs, by their numbers in the program."""
        left = self.equalities.resolved(term)
        return {tuple(self.places[one] for one in monomial): factor for monomial, factor in left.items() if factor}

    def _part(self, literal: Inequality) -> tuple[_Place, _End] | _Row:
        """A comparison as the end of an input, or else as a row."""
        if literal not in self.parts:
            try:
                self.parts[literal] = self._new_part(literal)
            except OverflowError:
                self.source.refuse(literal.token, "coefficients and ends of float64's range")
        return self.parts[literal]

    def _new_part(self, literal: Inequality) -> tuple[_Place, _End] | _Row:
        coefficients, constant = literal.coefficients, literal.constant
        if len(self.equalities):
            term = self._resolved(dict(coefficients))
            constant += term.pop(CONSTANT, Fraction(0))
            coefficients = tuple(term.items())
            if not coefficients:
                return _Row(literal, {}, constant > 0 or (constant == 0 and literal.strict))
        (monomial, factor), *others = coefficients
        variable = min(monomial)
        if others or len(monomial) > 1 or variable >= len(self.inputs):
            form = {monomial: float(factor) for monomial, factor in coefficients}
            form[CONSTANT] = outward64(constant, -math.inf)  # the closed set grows
            size = abs(min(coefficients)[1])
            direction = frozenset((monomial, factor / size) for monomial, factor in coefficients)
            return _Row(literal, form, False, direction, constant / size)
        value, upper = -constant / factor, factor > 0
        end = outward64(value, math.inf if upper else -math.inf)
        return (variable, upper), _End(literal.token, value, literal.strict, end)

    def _rows(self, literals: Literals, known: Mapping[_Direction, _Row]) -> list[_Row] | None:
        """The rows among the literals, without those that follow from one before or from one that is ``known``; None
        where two of all exclude each other, such as a < b and a >= b."""
        found, rows = dict[_Direction, _Row](), list[_Row]()
        for part in map(self._part, literals):
            if isinstance(part, _Row) and part.form:
                across, follows = part.opposite, False
                for others in (known, found):
                    if across in others and part.excludes(others[across]):
                        return None
                    follows |= part.direction in others and part.follows_from(others[part.direction])
                if not follows:
                    found[part.direction] = part
                if not follows or len(self.equalities):  # float32 may round inputs so that one holds without the other
                    rows.append(part)
        return rows

    def _never(self, literals: Literals) -> str | None:
        """Why some of the comparisons cannot hold where inputs are equal as asserted; None where each can."""
        for part in map(self._part, literals):
            if isinstance(part, _Row) and part.never:
                sign = part.literal.token
                return f"{self.source.path}, line {sign.line}: a {sign.text} that the equalities of inputs exclude"
        return None

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
        for i, number in enumerate(self.inputs):
            if not {(i, False), (i, True)} <= box.keys():
                accepted = "an input that has a lower and an upper end in every disjunct"
                self.source.refuse(self.variables.declared(number), accepted)

    def _crossed(self, box: _Box) -> str | None:
        """Why no input lies in a box; None where one does."""
        for i, number in enumerate(self.inputs):
            lower, upper = box[i, False], box[i, True]
            if lower.value > upper.value or (lower.value == upper.value and (lower.strict or upper.strict)):
                line = max(lower.token.line, upper.token.line)
                above, below = ">" if lower.strict else ">=", "<" if upper.strict else "<="
                found = f"{above} {float(lower.value)!r} and {below} {float(upper.value)!r}"
                return f"{self.source.path}, line {line}: an empty box: {self.variables.declared(number).text} {found}"
        return None

    def _case(self, box: _Box, clauses: list[list[_Row]], terms: tuple[Monomial, ...], common: int) -> Case:
        inputs, outputs = len(self.inputs), self.variables.outputs
        columns = [*((output,) for output in range(inputs, inputs + outputs)), *terms, CONSTANT]
        rows = [row for clause in clauses for row in clause]
        table = torch.tensor([[row.form.get(column, 0.0) for column in columns] for row in rows], dtype=torch.float64)
        numbers = torch.tensor([number for number, clause in enumerate(clauses) for _ in clause])
        pairs = [(box[i, False], box[i, True]) for i in range(inputs)]
        ends = torch.tensor([(lower.rounded, upper.rounded) for lower, upper in pairs], dtype=torch.float64)
        exact = tuple((lower.value, upper.value) for lower, upper in pairs)
        excluded = frozenset(place for place, end in box.items() if end.strict)
        written = tuple(row.literal for row in rows)
        return Case(ends[:, 0], ends[:, 1], exact, table[:, :-1], table[:, -1], numbers, excluded, written, common)


def _tighter(end: _End, other: _End, upper: bool) -> bool:
    """Whether an end cuts off more than another one of the same side."""
    if end.value == other.value:
        return end.strict and not other.strict
    return end.value < other.value if upper else end.value > other.value


def outward64(value: Fraction, direction: float) -> float:
    """``value`` as float64, rounded in the direction of ±inf."""
    near = float(value)  # to nearest
    return math.nextafter(near, direction) if (near > value if direction < 0 else near < value) else near
