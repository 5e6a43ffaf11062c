"""Certificates that rounding cannot break: what floating point may do to a network, and to our bounds of it.

A dot product of n terms, summed in any order with unit roundoff u, is off by at most gamma(n) = n u / (1 - n u) times
the sum of its terms' absolute values (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). So each
linear operation's output may be off by gamma times its *magnitude*, |W| |x| + |b|: in the network, if its evaluation
rounds, and in our own float64 coefficients. Intervals are widened by that, linear bounds lowered by |forms| times it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .interval import Interval
from .operations.base import UnsupportedNode

if TYPE_CHECKING:
    from .network import Network
    from .operations.base import Operation

OWN = 2.0**-53
"""Unit roundoff of our own arithmetic, float64."""
TINY = 1e-300
"""Above all that float64 underflow can lose in sums of any size here."""
SAFETY = 1 + 1e-6
"""On the error terms themselves, which are computed with roundings too."""


@dataclass(frozen=True)
class Rounding:
    """The arithmetic in which the certified network is evaluated.

    Args:
        unit: its unit roundoff; 0 for exact real arithmetic, 2^-24 for float32.
        underflow: what one operation may lose to gradual underflow; 0, or 2^-149.
    """

    unit: float = 0.0
    underflow: float = 0.0

    def network(self, operation: Operation, shape: torch.Size) -> float:
        """What the network's own evaluation of an operation may be off by, relative to its magnitude."""
        return gamma(operation.roundings(shape), self.unit)

    @property
    def least(self) -> float:
        """A magnitude at which relative errors cover underflow."""
        return self.underflow / self.unit if self.unit else 0.0


REAL = Rounding()
FLOAT32 = Rounding(2.0**-24, 2.0**-149)


def gamma(terms: int, unit: float) -> float:
    if terms * unit >= 0.5:
        raise UnsupportedNode(f"a sum of {terms} terms: too long for a bound of its rounding at unit {unit:g}")
    return terms * unit / (1 - terms * unit) * SAFETY


def widened(x: Interval) -> Interval:
    """Wide enough that ``lower`` and ``upper``, computed in float64, lie outside the true ends."""
    return Interval(x.center, (x.radius + 4 * OWN * (x.center.abs() + x.radius)) * (1 + 4 * OWN) + TINY)


def check(network: Network) -> None:
    """
    Raises:
        UnsupportedNode: rounding of an operation is not bounded here.
    """
    for number in network.nonlinear:
        operation = network.relaxed(number)
        if not operation.piecewise_linear:
            raise UnsupportedNode(
                f"{operation.path}: found {operation.kind}; accepted in this arithmetic: relu, leaky_relu"
            )


@dataclass(frozen=True)
class Slack:
    """What rounding may cost linear bounds of a batch: for each operation its magnitude (B, *shape) over the region,
    and the factor by which a form of its output may be off."""

    magnitudes: Mapping[int, Tensor]
    factors: Mapping[int, float]
    longest: int

    @classmethod
    def of(cls, network: Network, intervals: Mapping[int, Interval]) -> Slack:
        """Given an interval of every operation's output, as far as they are known."""
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
            # forms are off by our adjoint, by an addition where they meet, by lines and multipliers (16 roundings of a
            # number below the magnitude cover those); values by the network's own rounding
            own = network.rounding.network(operation, network.shapes[operation.inputs[0]])
            factors[number] = 2 * gamma(count, OWN) + 8 * OWN + own
        longest = max(shape.numel() for shape in network.shapes) + 8 * len(network.operations)
        return cls(magnitudes, factors, longest)

    def charge(self, number: int, forms: Tensor, magnitude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(what these forms of an operation's output may be too high by, the size of what they add), each (B, R).

        Args:
            magnitude: instead of the operation's whole one, where the forms are windows.
        """
        magnitude = self.magnitudes[number] if magnitude is None else magnitude
        size = (forms.abs() * magnitude.unsqueeze(1)).flatten(2).sum(-1)
        return self.factors[number] * size * SAFETY, size * SAFETY

    def remainder(self, forms: Tensor, size: Tensor, hull: Interval) -> Tensor:
        """(B, R): what the minimum over the input box, and the sum of all constants, may be too high by."""
        reach = (forms.abs() * (hull.center.abs() + 2 * hull.radius).unsqueeze(1)).flatten(2).sum(-1)
        return gamma(2 * self.longest, OWN) * (size + reach) * 2 * SAFETY + TINY


def interval_of(network: Network, operation: Operation, *inputs: Interval) -> Interval:
    """An operation's interval; with a rounding, it holds what the output should be and what the network makes of it."""
    found = operation.interval(*inputs)
    if network.rounding is None:
        return found
    rounding, shape = network.rounding, inputs[0].center.shape[1:]
    ends = [(x.center.abs() + x.radius) * SAFETY for x in inputs]
    size = operation.magnitude(*ends) * SAFETY + TINY + rounding.least
    error = (2 * gamma(operation.terms(shape) + 4, OWN) + rounding.network(operation, shape)) * size
    return widened(Interval(found.center, found.radius + SAFETY * error))
