"""Equalities among inputs, solved exactly: every input as an affine function of those that stay free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from .constraints import CONSTANT, Monomial, Term, added, multiplied
from .vnnlib_text import DIGITS


@dataclass(frozen=True, eq=False)
class FreeInputs:
    """Inputs as affine functions of the free ones, in rational numbers.

    Args:
        terms: for each input a polynomial of degree 1 at most in the free inputs, which are numbered from 0 in the
            order of the inputs.
        count: number of free inputs.
    """

    terms: tuple[Mapping[Monomial, Fraction], ...]
    count: int

    @cached_property
    def parts(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(index, factor) pairs, each (N,) int64 and float64: input i is the sum of factor[i] · free[index[i]] over the
        pairs, plus ``shift``. Without pairs where all inputs are constants."""
        linear = [[(m[0], float(factor)) for m, factor in term.items() if m] for term in self.terms]
        most = max(map(len, linear), default=0)
        padded = [own + [(0, 0.0)] * (most - len(own)) for own in linear]
        return tuple(
            (torch.tensor([own[k][0] for own in padded]), torch.tensor([own[k][1] for own in padded]).double())
            for k in range(most)
        )

    @cached_property
    def shift(self) -> Tensor:
        """(N,) float64, the constants."""
        return torch.tensor([float(term.get(CONSTANT, 0)) for term in self.terms], dtype=torch.float64)

    @cached_property
    def copies(self) -> bool:
        """Whether each input is one of the free inputs itself."""
        return all(len(term) == 1 and CONSTANT not in term and 1 in term.values() for term in self.terms)

    def at(self, free: Tensor) -> Tensor:
        """(P, N) float64: the inputs at points (P, F), up to rounding."""
        total = self.shift.expand(len(free), -1)
        for index, factor in self.parts:
            total = total + free.double()[:, index] * factor
        return total

    def written(self, free: Sequence[str]) -> list[str] | None:
        """The decimals of all inputs, exactly, at decimals of the free ones; None where one has no end, such as 1/3."""
        if self.copies:
            return [free[monomial[0]] for term in self.terms for monomial in term]
        values, texts = [Fraction(text) for text in free], list[str]()
        for term in self.terms:
            if len(term) == 1 and CONSTANT not in term and 1 in term.values():
                texts.append(free[next(iter(term))[0]])
                continue
            text = _decimal(sum((factor * (values[m[0]] if m else 1) for m, factor in term.items()), Fraction(0)))
            if text is None:
                return None
            texts.append(text)
        return texts


def _decimal(value: Fraction) -> str | None:
    """A fraction as a decimal, exactly; None where that has no end, or too many digits."""
    rest, context = value.denominator, Context(prec=2 * DIGITS)
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return None
    decimal = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    return str(decimal).replace("E", "e") if Fraction(decimal) == value else None


class Equalities:
    """Equalities among variables, each solved for one of them."""

    def __init__(self) -> None:
        self._solved: dict[int, Term] = {}

    def __len__(self) -> int:
        return len(self._solved)

    def __contains__(self, variable: int) -> bool:
        return variable in self._solved

    def add(self, term: Mapping[Monomial, Fraction]) -> None:
        """Solve ``term`` == 0, of degree 1, for one of its variables; not where less than two are left in it."""
        left = self.resolved(term)
        variables = [monomial for monomial, factor in left.items() if monomial and factor]
        if len(variables) < 2:
            return
        chosen = min(variables, key=lambda monomial: (_cost(left, monomial), -monomial[0]))
        factor = left.pop(chosen)
        self._solved[chosen[0]] = {m: -value / factor for m, value in left.items() if value}

    def resolved(self, term: Mapping[Monomial, Fraction]) -> Term:
        """The term in the variables that no equality is solved for."""
        if not any(variable in self._solved for monomial in term for variable in monomial):
            return dict(term)
        total: Term = {}
        for monomial, factor in term.items():
            product: Term = {CONSTANT: factor}
            for variable in monomial:
                product = multiplied(product, self._value(variable))
            added(total, product, 1)
        return total

    def finish(self) -> None:
        """Resolve all solutions, so that ``resolved`` takes one step."""
        for variable in reversed(self._solved):
            self._solved[variable] = self.resolved(self._solved[variable])

    def _value(self, variable: int) -> Term:
        if variable not in self._solved:
            return {(variable,): Fraction(1)}
        value = self._solved[variable]
        while any(other in self._solved for monomial in value for other in monomial):
            total: Term = {}
            for monomial, factor in value.items():
                own = self._solved.get(monomial[0]) if monomial else None
                added(total, {monomial: Fraction(1)} if own is None else own, factor)
            value = total
        self._solved[variable] = value
        return value


def _cost(term: Mapping[Monomial, Fraction], chosen: Monomial) -> tuple[bool, int]:
    """How badly decimals of the others give decimals of ``chosen``, which makes the sum 0: whether without an end, and
    the largest denominator."""
    ratios = [value / term[chosen] for monomial, value in term.items() if monomial != chosen]
    endless = any(pow(10, ratio.denominator.bit_length(), ratio.denominator) for ratio in ratios)
    return endless, max(ratio.denominator for ratio in ratios)
