"""Elementary functions: exp, log, powers, reciprocal, erf, sine and cosine, with their derivatives and pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from ..interval import Bounds
from ..relaxation import Lines
from .base import Function, Operation, UnsupportedOperation
from .curves import INFINITY, Piece, ScalarCurve
from .registry import Tracing, entrywise, from_function, number
from .scale import Scale


@dataclass(frozen=True, eq=False)
class Elementary(ScalarCurve):
    """A function whose errors are relative to its value, and which may leave the numbers: intervals tell, not sizes."""

    partial: ClassVar[bool] = True

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.maximum(self.value(lower).abs(), self.value(upper).abs())

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self.value)


@dataclass(frozen=True, eq=False)
class Exp(Elementary):
    """The exponential function: rising and convex."""

    kind: ClassVar[str] = "exp"
    error: ClassVar[float] = 4
    rises: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        return (Piece(-INFINITY, INFINITY, 1, torch.exp, torch.exp, torch.log),)


@dataclass(frozen=True, eq=False)
class Log(Elementary):
    """The natural logarithm: rising and concave, above 0; bounds of a box that reaches 0 are NaN."""

    kind: ClassVar[str] = "log"
    error: ClassVar[float] = 4
    rises: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def defined(self, lower: Tensor, upper: Tensor) -> Tensor:
        return (lower > 0) & (upper == upper)

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        return super().size(lower, upper).clamp(min=1)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        return (Piece(0.0, INFINITY, -1, torch.log, torch.reciprocal, torch.reciprocal),)


@dataclass(frozen=True, eq=False)
class Power(Elementary):
    """x to a constant exponent. Bounds are NaN where that is no finite number: for fractional exponents left of 0, for
    negative ones at 0.

    Raises:
        UnsupportedOperation: the exponent is 0 or 1, or not finite.
    """

    exponent: float

    kind: ClassVar[str] = "pow"
    error: ClassVar[float] = 4

    def __post_init__(self) -> None:
        if not math.isfinite(self.exponent) or self.exponent in (0, 1):
            raise UnsupportedOperation(
                f"pow at {self.path!r}: found exponent {self.exponent}; accepted: finite ones, other than 0 and 1"
            )

    @property
    def whole(self) -> bool:
        return float(self.exponent).is_integer()

    def value(self, x: Tensor) -> Tensor:
        return torch.pow(x, self.exponent)

    def defined(self, lower: Tensor, upper: Tensor) -> Tensor:
        known = (lower == lower) & (upper == upper)
        if self.exponent > 0:
            return known & (self.whole | (lower >= 0))
        return known & ((lower > 0) | ((upper < 0) if self.whole else False))

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        p = self.exponent

        def slope(x: Tensor) -> Tensor:
            return p * torch.pow(x, p - 1)

        def right(slope: Tensor) -> Tensor:
            return torch.pow((slope / p).clamp(min=0), 1 / (p - 1))

        def left(slope: Tensor) -> Tensor:
            return -torch.pow((slope / p).abs(), 1 / (p - 1))

        bend = -1 if 0 < p < 1 else 1
        if self.whole and p % 2 == 0 and p > 0:
            both = Piece(-INFINITY, INFINITY, 1, self.value, slope, lambda s: torch.where(s < 0, left(s), right(s)))
            return (both,)
        positive = Piece(0.0, INFINITY, bend, self.value, slope, right)
        if not self.whole:
            return (positive,)
        return (Piece(-INFINITY, 0.0, 1 if p % 2 == 0 else -1, self.value, slope, left), positive)


@dataclass(frozen=True, eq=False)
class Sqrt(Power):
    """The square root."""

    exponent: float = 0.5

    kind: ClassVar[str] = "sqrt"
    error: ClassVar[float] = 2

    def value(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)


@dataclass(frozen=True, eq=False)
class Reciprocal(Power):
    """1 / x, on either side of 0."""

    exponent: float = -1.0

    kind: ClassVar[str] = "reciprocal"
    error: ClassVar[float] = 2

    def value(self, x: Tensor) -> Tensor:
        return torch.reciprocal(x)


@dataclass(frozen=True, eq=False)
class Erf(ScalarCurve):
    """The error function: rising, convex left of 0, concave right of it."""

    kind: ClassVar[str] = "erf"
    error: ClassVar[float] = 4
    rises: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        return torch.erf(x)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        steep = 2 / math.sqrt(math.pi)

        def slope(x: Tensor) -> Tensor:
            return steep * torch.exp(-x.square())

        def right(slope: Tensor) -> Tensor:
            return (-(slope / steep).log()).clamp(min=0).sqrt()

        return (
            Piece(-INFINITY, 0.0, 1, self.value, slope, lambda s: -right(s)),
            Piece(0.0, INFINITY, -1, self.value, slope, right),
        )

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(torch.erf)


FAR = 4096.0
"""|x| beyond which waves are bounded by -1 and 1 alone: the places of their pieces are rounded there."""


@dataclass(frozen=True, eq=False)
class Wave(ScalarCurve):
    """A sine with its arches at ``phase`` + [k pi, (k + 1) pi], concave for even k and convex for odd ones."""

    error: ClassVar[float] = 4
    phase: ClassVar[float]

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.ones_like(lower)

    def slope(self, x: Tensor) -> Tensor:
        """The derivative."""
        raise NotImplementedError

    def image(self, x: Bounds) -> Bounds:
        inside = super().image(x)
        kept = self._near(x.lower, x.upper) | inside.lower.isnan()
        lower, upper = torch.where(kept, inside.lower, -1.0), torch.where(kept, inside.upper, 1.0)
        return Bounds(lower.clamp(-1, 1), upper.clamp(-1, 1))

    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        near, inside = self._near(lower, upper), super().lines(lower, upper, alpha)
        assert inside.lower_intercept is not None
        far = 1 + self.kernel_error(lower, upper)
        down, up = (torch.where(near, slope, 0.0) for slope in (inside.lower_slope, inside.upper_slope))
        kept = near | ~self.defined(lower, upper)
        above, below = torch.where(kept, inside.upper_intercept, far), torch.where(kept, inside.lower_intercept, -far)
        return Lines(down, up, above, below)

    @staticmethod
    def _near(lower: Tensor, upper: Tensor) -> Tensor:
        return (lower >= -FAR) & (upper <= FAR)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        """The first two and the last two arches of each bend: extremes of f(x) - s x change evenly in between."""
        first, last = (  # an end that may as well lie on the arch before or behind counts as there
            torch.floor((end.clamp(-2 * FAR, 2 * FAR) - self.phase) / math.pi + spare)
            for end, spare in ((lower, -1e-3), (upper, 1e-3))
        )
        ends = Piece(-INFINITY, INFINITY, 0, self.value, self.slope)  # an end may lie between two arches as rounded
        return [ends] + [
            self._arch(number, odd)
            for odd in (0, 1)
            for start, end in [(2 * ((first - odd) / 2).ceil() + odd, 2 * ((last - odd) / 2).floor() + odd)]
            for number in (start, start + 2, end - 2, end)
        ]

    def _arch(self, number: Tensor, odd: int) -> Piece:
        start = self.phase + number * math.pi
        sign = 1.0 - 2.0 * odd  # the slope falls from 1 to -1 on even arches
        return Piece(
            start, start + math.pi, 1 if odd else -1, self.value, self.slope,
            lambda slope: start + torch.acos((sign * slope).clamp(-1, 1)),
        )  # fmt: skip

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self.value)


@dataclass(frozen=True, eq=False)
class Sin(Wave):
    """The sine."""

    kind: ClassVar[str] = "sin"
    phase: ClassVar[float] = 0.0

    def value(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def slope(self, x: Tensor) -> Tensor:
        return torch.cos(x)


@dataclass(frozen=True, eq=False)
class Cos(Wave):
    """The cosine."""

    kind: ClassVar[str] = "cos"
    phase: ClassVar[float] = -math.pi / 2

    def value(self, x: Tensor) -> Tensor:
        return torch.cos(x)

    def slope(self, x: Tensor) -> Tensor:
        return -torch.sin(x)


def power(path: str, source: int, exponent: float) -> Operation:
    """x to the ``exponent``, in the form that torch and onnxruntime compute."""
    if exponent in (0, 1):
        coefficients = (1.0, 0.0) if exponent == 1 else (0.0, 1.0)
        return Scale(path, (source,), lambda: coefficients)
    return Power(path, (source,), exponent)


from_function("exp")(entrywise(Exp))
from_function("log")(entrywise(Log))
from_function("sqrt")(entrywise(Sqrt))
from_function("reciprocal")(entrywise(Reciprocal))
from_function("erf", "special_erf")(entrywise(Erf))
from_function("sin")(entrywise(Sin))
from_function("cos")(entrywise(Cos))
from_function("square")(entrywise(partial(Power, exponent=2.0)))


@from_function("pow")
def _pow(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(power(node.name, source, number(node, 1, "exponent")))


@from_function("rsqrt")
def _rsqrt(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Reciprocal(node.name, (tracing.append(Sqrt(node.name, (source,))),)))
