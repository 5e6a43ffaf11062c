"""GELU (by erf, and by tanh) and SiLU: x times a gate of x. ``gates.py`` computes their lines."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..interval import Bounds
from ..relaxation import Lines
from .base import UnsupportedOperation
from .curves import INFINITY, Piece, Pieced, halved
from .gates import GATES, STRAIGHT, gated
from .registry import Tracing, from_function, from_module

FLAT = 60.0
"""|x| beyond which derivatives are 0 or 1 in float64."""


@dataclass(frozen=True)
class Trough:
    """The minimum of a function that falls before and rises after it; both numbers are rounded to nearest."""

    place: float
    value: float

    def lies_in(self, x: Bounds) -> Tensor:
        """Whether the minimum may lie within the ends; never False if it does.

        Rounding is monotone, so the two neighbours of ``place`` enclose the exact one in any format of the comparison.
        """
        return (x.lower <= math.nextafter(self.place, math.inf)) & (x.upper >= math.nextafter(self.place, -math.inf))

    def below(self, dtype: torch.dtype) -> float:
        """A number below the minimum and below all values that torch computes near it, by 4 eps.

        Measured: over all float32 in [-2, -0.25] the lowest value is at most 1.1 eps (relative) below the minimum.
        """
        return self.value * (1 + 4 * torch.finfo(dtype).eps)


@dataclass(frozen=True, eq=False)
class Gated(Pieced):
    """A function that falls up to its only minimum and then rises: convex around 0, concave further out."""

    differentiable: ClassVar[bool] = True
    trough: ClassVar[Trough]

    def image(self, x: Bounds) -> Bounds:
        """The range between two ends; a minimum inside is rounded down, with gradient 0."""
        first, last = self._finite_value(x.lower), self._finite_value(x.upper)
        least = torch.where(self.trough.lies_in(x), self.trough.below(x.lower.dtype), torch.minimum(first, last))
        return Bounds(least, torch.maximum(first, last))

    def _finite_value(self, x: Tensor) -> Tensor:
        """``value`` without NaN at infinity: x beyond ``STRAIGHT``."""
        return torch.where(x > STRAIGHT, x, self.value(x.clamp(-STRAIGHT, STRAIGHT)))

    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        """Lines that enclose the function, with room for the kernels' error."""
        (lower_slope, lower_intercept), (upper_slope, upper_intercept) = gated(GATES[self.kind], lower, upper)
        return Lines(lower_slope, upper_slope, upper_intercept, lower_intercept)

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.maximum(lower.abs(), upper.abs()).clamp(min=1)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        gate = GATES[self.kind]

        def slope(x: Tensor) -> Tensor:
            return 0.5 + gate.slope(x)

        def piece(start: float, end: float, bend: int, falling: float, rising: float) -> Piece:
            return Piece(start, end, bend, self._finite_value, slope, halved(slope, falling, rising))

        bend = gate.bend
        return (
            piece(-INFINITY, -bend, -1, -bend, -FLAT), piece(-bend, bend, 1, -bend, bend),
            piece(bend, INFINITY, -1, FLAT, bend),
        )  # fmt: skip

    @abstractmethod
    def module(self, shape: torch.Size) -> nn.Module: ...


@dataclass(frozen=True, eq=False)
class Gelu(Gated):
    """x (1 + erf(x / sqrt(2))) / 2."""

    kind: ClassVar[str] = "gelu"
    # troughs, here and below: roots of the derivatives by 50-digit arithmetic
    trough: ClassVar[Trough] = Trough(-0.7517915246935644575, -0.1699712074799036617)

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.GELU()


@dataclass(frozen=True, eq=False)
class GeluTanh(Gated):
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""

    kind: ClassVar[str] = "gelu_tanh"
    trough: ClassVar[Trough] = Trough(-0.7524614220710162585, -0.1700407505712540506)

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.GELU("tanh")


@dataclass(frozen=True, eq=False)
class Silu(Gated):
    """x sigmoid(x)."""

    kind: ClassVar[str] = "silu"
    trough: ClassVar[Trough] = Trough(-1.2784645427610737951, -0.2784645427610737951)

    def value(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.SiLU()


def gelu(path: str, source: int, form: Any) -> Gelu | GeluTanh:
    """The GELU that torch and ONNX call ``approximate=form``."""
    kinds: dict[Any, type[Gelu | GeluTanh]] = {"none": Gelu, "tanh": GeluTanh}
    if not isinstance(form, str) or form not in kinds:
        raise UnsupportedOperation(f"GELU at {path!r}: found approximate={form!r}; accepted: {', '.join(kinds)}")
    return kinds[form](path, (source,))


@from_module(nn.GELU)
def _gelu(tracing: Tracing, path: str, source: int, module: nn.GELU) -> int:
    return tracing.append(gelu(path, source, module.approximate))


@from_function("gelu")
def _gelu_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(gelu(node.name, source, node.kwargs.get("approximate", "none")))


@from_module(nn.SiLU)
def _silu(tracing: Tracing, path: str, source: int, module: nn.SiLU) -> int:
    return tracing.append(Silu(path, (source,)))


@from_function("silu")
def _silu_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Silu(node.name, (source,)))
