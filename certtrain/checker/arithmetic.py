"""Numbers: float64 with error bounds, or exact fractions.

A sum of n products, in any order, with unit roundoff u is off by at most gamma(n) = n u / (1 - n u)
times the sum of the products' absolute values (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1). All errors are bounded this way, from computed magnitudes.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

UNIT = 2.0**-53
SINGLE = 2.0**-24
SAFETY = 1 + 1e-6
"""Factor on error bounds, which are themselves computed with rounding."""
TINY = 1e-300
"""More than the underflow of any sum computed here."""
LEAST = 2.0**-125
"""Added to magnitudes for float32: from there on relative errors cover its underflow."""


class Rejected(Exception):
    """The proof does not prove the claim; the message says where."""


def demand(holds, why):
    """Reject the proof unless a condition holds."""
    if not holds:
        raise Rejected(why)


@dataclass(frozen=True)
class Numbers:
    """The numbers that a check computes with, and the evaluation of the network that it speaks of.

    Args:
        exact: fractions in place of float64.
        single: the claim is to hold for the network evaluated in float32 too, sums in any order.
    """

    exact: bool = False
    single: bool = False

    def numbers(self, values):
        """An array of float64, or of fractions."""
        values = np.asarray(values)
        if values.dtype == object and not self.exact:
            return np.array([float(v) for v in values.flat], dtype=np.float64).reshape(values.shape)
        if not self.exact or values.dtype == object:
            return values if self.exact else values.astype(np.float64)
        return np.asarray(np.frompyfunc(Fraction, 1, 1)(values.astype(np.float64)), dtype=object)

    def zeros(self, *shape):
        return self.numbers(np.zeros(shape))

    def gamma(self, terms):
        """The relative error of a sum of ``terms`` products as computed here."""
        return 0 if self.exact else _gamma(terms, UNIT)

    def network(self, roundings):
        """The relative error of a sum of so many roundings as the network computes it."""
        return _gamma(roundings, SINGLE) if self.single else 0

    def outward(self, lower, upper, error: Any = 0) -> tuple[Any, Any]:
        """The ends, moved apart by ``error`` and by the rounding of that."""
        if self.exact:
            return lower - error, upper + error
        margin = error * SAFETY + 4 * UNIT * (np.abs(lower) + np.abs(upper)) + TINY
        return lower - margin, upper + margin

    def middle(self, lower, upper):
        """(center, radius): a ball that contains the interval."""
        if self.exact:
            return (lower + upper) / 2, (upper - lower) / 2
        center = lower + (upper - lower) / 2
        radius = np.maximum(upper - center, center - lower)
        return center, np.maximum(radius, 0) * (1 + 4 * UNIT) + TINY

    def magnitude(self, size):
        """A computed magnitude, made safe to multiply with a relative error."""
        return size if self.exact else size * SAFETY + (LEAST if self.single else TINY)


def _gamma(terms, unit):
    demand(terms * unit < 0.1, f"a sum of {terms} terms: too long for a bound of its rounding")
    return terms * unit / (1 - terms * unit) * SAFETY
