"""Certificates that hold under rounding: error bounds for the network's evaluation and for our own arithmetic.

A dot product of n terms, summed in any order with unit roundoff u, has an error of at most gamma(n) = n u / (1 - n u)
times the sum of its terms' absolute values (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). So a
linear operation's output has an error of at most gamma times its *magnitude*, |W| |x| + |b|: in the network, if its
evaluation rounds, and in our float64 coefficients. Intervals are widened, and linear bounds lowered, accordingly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .interval import Interval
from .operations.base import UnsupportedOperation

if TYPE_CHECKING:
    from .network import Network
    from .operations.base import Operation

OWN = 2.0**-53
"""Unit roundoff of our own arithmetic, float64."""
TINY = 1e-300
"""Upper bound of the total float64 underflow in any sum computed here."""
SAFETY = 1 + 1e-6
"""Factor on error terms, which are themselves computed with rounding."""


@dataclass(frozen=True)
class Rounding:
    """The arithmetic in which the certified network is evaluated.

    Args:
        unit: unit roundoff; 0 for exact real arithmetic, 2^-24 for float32.
        underflow: the largest error of one operation by gradual underflow; 0, or 2^-149.
    """

    unit: float = 0.0
    underflow: float = 0.0

    def network(self, operation: Operation, shape: torch.Size) -> float:
        """Error bound of the network's evaluation of an operation, relative to its magnitude.

        Args:
            shape: of the operation's first input.
        """
        return gamma(operation.roundings(shape), self.unit)

    @property
    def least(self) -> float:
        """The magnitude from which on relative errors cover underflow."""
        return self.underflow / self.unit if self.unit else 0.0


REAL = Rounding()
FLOAT32 = Rounding(2.0**-24, 2.0**-149)


def gamma(terms: int, unit: float) -> float:
    """Relative error bound of a sum of ``terms`` products at unit roundoff ``unit``.

    Raises:
        UnsupportedOperation: the sum is too long for a bound.
    """
    if terms * unit >= 0.5:
        raise UnsupportedOperation(
            f"found a sum of {terms} terms; accepted: fewer than {0.5 / unit:g} at unit roundoff {unit:g}"
        )
    return terms * unit / (1 - terms * unit) * SAFETY


def widened(x: Interval) -> Interval:
    """The interval, widened so that ``lower`` and ``upper``, computed in float64, lie outside the exact ends."""
    return Interval(x.center, (x.radius + 4 * OWN * (x.center.abs() + x.radius)) * (1 + 4 * OWN) + TINY)


def check(network: Network) -> None:
    """Refuse a network with an operation whose rounding has no bound.

    Raises:
        UnsupportedOperation: naming the operation.
    """
    for number in network.nonlinear:
        operation = network.nonlinear_at(number)
        if not operation.rounding_is_bounded:
            raise UnsupportedOperation(
                f"{operation.path}: found {operation.kind}; "
                "accepted in this arithmetic: relu, leaky_relu, clips, abs, prelu, max"
            )


@dataclass(frozen=True)
class Slack:
    """Rounding errors of linear bounds of a batch over a region.

    Args:
        magnitudes: (B, *shape) of each operation's output over the region, by position.
        factors: relative error bound of forms of each operation's output, by position.
        longest: upper bound of the number of terms in any sum of the final minimum.
    """

    magnitudes: Mapping[int, Tensor]
    factors: Mapping[int, float]
    longest: int

    @classmethod
    def of(cls, network: Network, intervals: Mapping[int, Interval]) -> Slack:
        """The slack of a network with a ``rounding``, from intervals of operations' outputs by position."""
        assert network.rounding is not None
        magnitudes, factors = dict[int, Tensor](), dict[int, float]()
        for number in sorted(intervals):
            if number == 0:
                continue
            operation = network.operations[number]
            ends = [(intervals[i].center.abs() + intervals[i].radius) * SAFETY for i in operation.inputs]
            repeats = network.shapes[number].numel() // min(network.shapes[i].numel() for i in operation.inputs)
            count = operation.terms(network.shapes[operation.inputs[0]]) + repeats + 4
            size = operation.magnitude(*ends)
            magnitudes[number] = size * SAFETY + TINY + network.rounding.least
            # errors of forms: our adjoint, additions where forms join, lines and multipliers (16 roundings of a number
            # below the magnitude cover these); errors of values: the network's own rounding
            own = network.rounding.network(operation, network.shapes[operation.inputs[0]])
            factors[number] = 2 * gamma(count, OWN) + 8 * OWN + own
        longest = max(shape.numel() for shape in network.shapes) + 8 * len(network.operations)
        return cls(magnitudes, factors, longest)

    def charge(self, number: int, forms: Tensor, magnitude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(error bound of forms of an operation's output, magnitude of their values), each (B, R).

        Args:
            magnitude: replaces the operation's whole one where the forms are windows.
        """
        magnitude = self.magnitudes[number] if magnitude is None else magnitude
        size = (forms.abs() * magnitude.unsqueeze(1)).flatten(2).sum(-1)
        return self.factors[number] * size * SAFETY, size * SAFETY

    def remainder(self, forms: Tensor, size: Tensor, hull: Interval) -> Tensor:
        """(B, R): error bound of the minimum over the input box and of the sum of all constants, of total ``size``."""
        reach = (forms.abs() * (hull.center.abs() + 2 * hull.radius).unsqueeze(1)).flatten(2).sum(-1)
        return gamma(2 * self.longest, OWN) * (size + reach) * 2 * SAFETY + TINY


def interval_of(network: Network, operation: Operation, *inputs: Interval) -> Interval:
    """An operation's output interval; with a rounding, it contains the exact and the network's rounded outputs."""
    output = operation.interval(*inputs)
    if network.rounding is None:
        return output
    rounding, shape = network.rounding, inputs[0].center.shape[1:]
    ends = [(x.center.abs() + x.radius) * SAFETY for x in inputs]
    size = operation.magnitude(*ends) * SAFETY + TINY + rounding.least
    error = (2 * gamma(operation.terms(shape) + 4, OWN) + rounding.network(operation, shape)) * size
    return widened(Interval(output.center, output.radius + SAFETY * error))
