"""Equalities among inputs, solved exactly: every input as an affine function of those that stay free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from ..typed import as_floats
from .constraints import CONSTANT, Monomial, Term, added, multiplied
from .vnnlib_text import DIGITS

BITS = (22, 20, 16, 12, 8, 4)
"""Numbers of bits to which points are rounded until float32 holds all inputs exactly, of the largest input's 24."""

PLACES = 12
"""Decimal places beside those of the numbers that denominators are multiples of: points move by 10^-12 at most."""


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
    def _odd(self) -> Mapping[int, float]:
        """For the free inputs that others are computed of, the odd number whose multiples these need to be floats."""
        found = dict[int, int]()
        for term in (term for term in self.terms if not _is_copy(term)):
            for monomial, factor in term.items():
                odd = factor.denominator // (factor.denominator & -factor.denominator)
                for place in monomial:
                    found[place] = math.lcm(found.get(place, 1), odd)
        return {place: float(odd) if odd < 1 << 24 else 1.0 for place, odd in found.items()}

    @cached_property
    def copies(self) -> bool:
        """Whether each input is one of the free inputs itself."""
        return all(map(_is_copy, self.terms))

    def at(self, free: Tensor) -> Tensor:
        """(P, N) float64: the inputs at points (P, F), up to rounding."""
        total = self.shift.expand(len(free), -1)
        for index, factor in self.parts:
            total = total + free.double()[:, index] * factor
        return total

    def on_grid(self, free: Tensor) -> list[str] | None:
        """Decimals of a point near ``free`` (F,), exactly, at which float32 holds all inputs exactly, as it often does
        sums of floats of fewer bits; None where there is none near, and where all inputs are copies anyway."""
        if self.copies:
            return None
        computed = [term for term in self.terms if not _is_copy(term)]
        shared = sorted(self._odd)
        odd = torch.tensor([self._odd[place] for place in shared], dtype=torch.float64)
        largest = max(float(self.at(free[None]).abs().max()), float(free.abs().max()), torch.finfo(torch.float32).tiny)
        for bits in BITS:
            step, point = odd * 2.0 ** (math.frexp(largest)[1] - bits), free.float().double()
            point[shared] = (point[shared] / step).round() * step
            values = [Fraction(value) for value in as_floats(point)]
            if _are_float32(values) and _are_float32([_value(term, values) for term in computed]):
                return [str(Decimal(value)).replace("E", "e") for value in as_floats(point + 0.0)]
        return None

    def written(self, free: Sequence[str], allows: Callable[[int, Fraction], bool]) -> list[str] | None:
        """The decimals of all inputs, exactly, at decimals of the free ones, or at others next to these where an input
        has no end there, such as 1/3; None where none are found.

        Args:
            allows: whether a free input, by its number, may have a value.
        """
        if self.copies:
            return [free[min(min(term))] for term in self.terms]
        values, moved = [Fraction(text) for text in free], set[int]()
        if self._endless and not self._fit(values, moved, allows):
            return None
        own = [_decimal(values[place]) if place in moved else text for place, text in enumerate(free)]
        texts = [own[min(min(term))] if _is_copy(term) else _decimal(_value(term, values)) for term in self.terms]
        whole = [text for text in texts if text is not None]
        return whole if len(whole) == len(texts) else None

    @cached_property
    def _endless(self) -> tuple[tuple[int, Mapping[Monomial, Fraction]], ...]:
        """The inputs, as terms, that may have no end as decimals, each with the odd number, no multiple of 5, of which
        its denominators are multiples."""
        found = [(math.lcm(*(_endless_part(factor.denominator) for factor in term.values())), term)
                 for term in self.terms if not _is_copy(term)]  # fmt: skip
        return tuple((modulus, term) for modulus, term in found if modulus > 1)

    def _fit(self, values: list[Fraction], moved: set[int], allows: Callable[[int, Fraction], bool]) -> bool:
        """Move ``values``, decimals of the free inputs, so little that all inputs are decimals; whether it is done.

        For each input that is no decimal yet, one of its free inputs is moved by a multiple of 10^-digits that makes up
        the remainder, and of the numbers that the inputs before it ask for.
        """
        digits = PLACES + sum(len(str(modulus)) for modulus, _ in self._endless)
        if digits > DIGITS:
            return False
        steps = dict[int, int]()
        for modulus, term in self._endless:
            places = [min(one) for one in term if one]
            if _endless_part(_value(term, values).denominator) > 1 and not any(
                self._move(place, modulus, term, values, Fraction(steps.get(place, 1), 10**digits), allows)
                and not moved.add(place)
                for place in places
            ):
                return False
            steps |= {place: math.lcm(steps.get(place, 1), modulus) for place in places}
        return True

    @staticmethod
    def _move(
        place: int, modulus: int, term: Mapping[Monomial, Fraction], values: list[Fraction], step: Fraction,
        allows: Callable[[int, Fraction], bool],
    ) -> bool:  # fmt: skip
        """Move a free input by a multiple of ``step`` to where the term is a decimal; whether there is one."""
        value, slope = _value(term, values), term[place,] * step
        power = 10 ** max(_ending(value.denominator), _ending(slope.denominator))
        rest, rise = int(value * power * modulus), int(slope * power * modulus)
        common = math.gcd(rise, modulus)
        if rest % common:
            return False
        period = modulus // common
        count = -rest // common * pow(rise // common, -1, period) % period
        for times in (count, count - period):
            if allows(place, values[place] + times * step):
                values[place] += times * step
                return True
        return False


def _is_copy(term: Mapping[Monomial, Fraction]) -> bool:
    return len(term) == 1 and CONSTANT not in term and 1 in term.values()


def _value(term: Mapping[Monomial, Fraction], values: Sequence[Fraction]) -> Fraction:
    """An affine term of the free inputs at their values."""
    return sum((factor * (values[min(one)] if one else 1) for one, factor in term.items()), Fraction(0))


def _are_float32(values: Sequence[Fraction]) -> bool:
    """Whether float32 holds all the values exactly."""
    near = torch.tensor([float(value) for value in values], dtype=torch.float64)
    exact = all(Fraction(one) == value for one, value in zip(as_floats(near), values, strict=True))
    return exact and torch.equal(near.float().double(), near)


def _endless_part(denominator: int) -> int:
    """The largest divisor without factors 2 and 5."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator


def _ending(denominator: int) -> int:
    """The number of digits of a decimal with the divisor of ``denominator`` that has no factors but 2 and 5."""
    return (denominator // _endless_part(denominator)).bit_length()


def _decimal(value: Fraction) -> str | None:
    """A fraction as a decimal, exactly; None where that has no end, or too many digits."""
    if _endless_part(value.denominator) > 1:
        return None
    decimal = Context(prec=2 * DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    return str(decimal).replace("E", "e") if Fraction(decimal) == value else None


class Equalities:
    """Equalities among variables, each solved for one of them.

    Args:
        terms: of degree 1, each of which is 0. An equality in which one variable is left, once all others are solved,
            is not solved.
    """

    def __init__(self, terms: Sequence[Mapping[Monomial, Fraction]] = ()) -> None:
        self._solved: dict[int, Term] = {}
        before = -1
        while before < len(self._solved):  # what was left in one variable may be in several now
            before = len(self._solved)
            for term in terms:
                self._solve(term)
        for variable in reversed(self._solved):
            self._solved[variable] = self.resolved(self._solved[variable])

    def __len__(self) -> int:
        return len(self._solved)

    def __contains__(self, variable: int) -> bool:
        return variable in self._solved

    def _solve(self, term: Mapping[Monomial, Fraction]) -> None:
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
