"""Constraints on a network's inputs and outputs: trees of comparisons of terms up to degree 2, with exact numbers.

Variables are numbered: the inputs first, then the outputs, both flattened.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from .vnnlib_text import Token

Monomial: TypeAlias = tuple[int, ...]
"""A product of variables, by their numbers in rising order; of one variable, that variable itself."""

CONSTANT: Monomial = ()
"""The product of no variables: 1."""

DEGREE = 2
"""Largest number of factors of a monomial."""

ONE = Fraction(1)

Term: TypeAlias = dict[Monomial, Fraction]
"""A polynomial: coefficients by monomial."""

Limit: TypeAlias = Callable[[Token, int, int], None]
"""Refuses a normal form of too many disjuncts, or too many comparisons in all of them."""


class Constraint(ABC):
    """A condition on the variables.

    Args:
        token: its operator in the file, for errors.
    """

    token: Token

    @abstractmethod
    def disjuncts(self, limit: Limit) -> list[Literals]:
        """The disjunctive normal form: the constraint holds where all comparisons of some disjunct do."""


@dataclass(frozen=True, eq=False)
class Inequality(Constraint):
    """A polynomial of one variable or more that is <= 0, or < 0 where ``strict``.

    Args:
        coefficients: (monomial, coefficient) pairs, none of them 0.
    """

    token: Token
    coefficients: tuple[tuple[Monomial, Fraction], ...]
    constant: Fraction
    strict: bool

    def holds(self, values: Sequence[float | Fraction], closed: bool = False) -> bool:
        """Whether it holds, in exact arithmetic, at finite values of all variables; as <= 0 where ``closed``."""
        total = self.constant
        for monomial, factor in self.coefficients:
            total += factor * math.prod(Fraction(values[variable]) for variable in monomial)
        return total <= 0 if closed or not self.strict else total < 0

    def disjuncts(self, limit: Limit) -> list[Literals]:
        return [(self,)]


Literals: TypeAlias = tuple[Inequality, ...]
"""Comparisons that must all hold."""


@dataclass(frozen=True, eq=False)
class Conjunction(Constraint):
    """All parts hold; true without any."""

    token: Token
    parts: tuple[Constraint, ...]

    def disjuncts(self, limit: Limit) -> list[Literals]:
        shared, rest = self.factored(limit)
        limit(self.token, len(rest), sum(map(len, rest)) + len(rest) * len(shared))
        return [shared + literals for literals in rest]

    def factored(self, limit: Limit) -> tuple[Literals, list[Literals]]:
        """(shared, disjuncts): the normal form as the comparisons that all disjuncts share, which may be too many to
        copy, and the disjuncts without them."""
        factors = [part.disjuncts(limit) for part in self.parts]
        disjuncts: list[Literals] = [()] if all(factors) else []
        for factor in (factor for factor in factors if len(factor) > 1):
            size = len(disjuncts) * sum(map(len, factor)) + len(factor) * sum(map(len, disjuncts))
            limit(self.token, len(disjuncts) * len(factor), size)
            disjuncts = [left + right for left in disjuncts for right in factor]
        return tuple(literal for factor in factors if len(factor) == 1 for literal in factor[0]), disjuncts


@dataclass(frozen=True, eq=False)
class Disjunction(Constraint):
    """Some part holds; false without any."""

    token: Token
    parts: tuple[Constraint, ...]

    def disjuncts(self, limit: Limit) -> list[Literals]:
        found = [literals for part in self.parts for literals in part.disjuncts(limit)]
        limit(self.token, len(found), sum(map(len, found)))
        return found


NEGATED = {"<=": ">", "<": ">=", ">=": "<", ">": "<=", "==": "!=", "!=": "=="}
"""Comparisons that hold where another does not."""


def compare(token: Token, sign: str, left: Term, right: Term) -> Constraint:
    """The constraint ``left sign right``, for the signs of ``NEGATED``."""
    if sign in (">=", ">"):
        left, right = right, left
    difference = added(dict(left), right, -1)
    if sign in ("==", "!="):
        both = tuple(_at_most(token, term, sign == "!=") for term in (difference, added({}, difference, -1)))
        return Conjunction(token, both) if sign == "==" else Disjunction(token, both)
    return _at_most(token, difference, sign in ("<", ">"))


def _at_most(token: Token, term: Term, strict: bool) -> Constraint:
    """term <= 0, or < 0; decided at once where the term is a constant."""
    constant = term.get(CONSTANT, Fraction(0))
    coefficients = tuple((monomial, factor) for monomial, factor in term.items() if factor and monomial != CONSTANT)
    if coefficients:
        return Inequality(token, coefficients, constant, strict)
    return Conjunction(token, ()) if constant < 0 or (constant == 0 and not strict) else Disjunction(token, ())


def added(total: Term, term: Mapping[Monomial, Fraction], factor: Fraction | int) -> Term:
    """Add factor · term to ``total``, in place."""
    for monomial, value in term.items():
        scaled = value if factor == 1 else -value if factor == -1 else factor * value
        total[monomial] = total[monomial] + scaled if monomial in total else scaled
    return total


def multiplied(left: Mapping[Monomial, Fraction], right: Mapping[Monomial, Fraction]) -> Term:
    """left · right, without the monomials whose coefficients are 0."""
    total: Term = {}
    for monomial, factor in left.items():
        added(total, {tuple(sorted(monomial + other)): value for other, value in right.items()}, factor)
    return {monomial: factor for monomial, factor in total.items() if factor}


def degree(term: Mapping[Monomial, Fraction]) -> int:
    """The largest number of factors of its monomials whose coefficients are not 0."""
    return max((len(monomial) for monomial, factor in term.items() if factor), default=0)
