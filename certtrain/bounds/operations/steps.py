"""Functions with steps: floor, ceil, round half to even, and sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..interval import Bounds
from ..relaxation import Lines
from .base import Function
from .curves import INFINITY, Piece, ScalarCurve, flat
from .registry import entrywise, from_function

NEAR = 4
"""Ends are moved outward by this times eps and their size before a step is looked for: what comes before may round
otherwise elsewhere, which a step would turn into a whole number."""


@dataclass(frozen=True, eq=False)
class Steps(ScalarCurve):
    """A function that is constant between steps, at each of which both levels count as values."""

    error: ClassVar[float] = 0
    rises: ClassVar[bool] = True

    def image(self, x: Bounds) -> Bounds:
        return super().image(Bounds(*_moved(x.lower, x.upper)))

    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        return super().lines(*_moved(lower, upper), alpha)

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self.value)


def _moved(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    spare = NEAR * torch.finfo(lower.dtype).eps
    return lower - spare * lower.detach().abs(), upper + spare * upper.detach().abs()


def level(start: float | Tensor, end: float | Tensor, height: float | Tensor) -> Piece:
    """A constant piece."""
    return Piece(start, end, 0, lambda x: torch.zeros_like(x) + height, flat)


@dataclass(frozen=True, eq=False)
class Staircase(Steps):
    """A step at each whole number plus an offset."""

    begins: ClassVar[float]
    """Where the level k begins, from k on; it ends 1 further."""

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        """The first two levels and the last two; in between, extremes of f(x) - s x go up or down evenly."""
        first, last = self.value(lower), self.value(upper)
        return [level(k + self.begins, k + self.begins + 1, k) for k in (first, first + 1, last - 1, last)]


@dataclass(frozen=True, eq=False)
class Floor(Staircase):
    """The largest whole number up to x."""

    kind: ClassVar[str] = "floor"
    begins: ClassVar[float] = 0.0

    def value(self, x: Tensor) -> Tensor:
        return torch.floor(x)


@dataclass(frozen=True, eq=False)
class Ceil(Staircase):
    """The smallest whole number from x on."""

    kind: ClassVar[str] = "ceil"
    begins: ClassVar[float] = -1.0

    def value(self, x: Tensor) -> Tensor:
        return torch.ceil(x)


@dataclass(frozen=True, eq=False)
class Round(Staircase):
    """The nearest whole number, the even one of two."""

    kind: ClassVar[str] = "round"
    begins: ClassVar[float] = -0.5

    def value(self, x: Tensor) -> Tensor:
        return torch.round(x)


@dataclass(frozen=True, eq=False)
class Signum(Steps):
    """-1, 0 or 1."""

    kind: ClassVar[str] = "sign"

    def value(self, x: Tensor) -> Tensor:
        return torch.sign(x)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        return (level(-INFINITY, 0.0, -1.0), level(0.0, 0.0, 0.0), level(0.0, INFINITY, 1.0))


from_function("floor")(entrywise(Floor))
from_function("ceil")(entrywise(Ceil))
from_function("round")(entrywise(Round))
from_function("sign", "sgn")(entrywise(Signum))
