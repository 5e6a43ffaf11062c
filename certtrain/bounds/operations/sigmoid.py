"""Sigmoid and tanh, enclosed by tangents and chords (arXiv 1811.00866, section 3.3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from ..interval import Bounds
from ..relaxation import Lines
from .curves import INFINITY, Piece, Pieced
from .entrywise import KERNEL_ERROR
from .registry import Tracing, from_function, from_module

ROUNDING = 4
"""Lines above tanh are lifted by this times eps and the numbers' size, for the roundings of tanh and of slope times x.
Measured: 2.8 at most, for ends around every change of case, in both dtypes (``tests/test_lines.py``)."""


@dataclass(frozen=True, eq=False)
class Saturating(Pieced):
    """An increasing function between two limits: convex left of 0, concave right of it."""

    differentiable: ClassVar[bool] = True

    def image(self, x: Bounds) -> Bounds:
        return Bounds(self(x.lower), self(x.upper))

    def kernel_error(self, lower: Tensor, upper: Tensor) -> Tensor:
        return KERNEL_ERROR * torch.finfo(lower.dtype).eps * torch.ones_like(lower.detach())

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.ones_like(lower)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        return (
            Piece(-INFINITY, 0.0, 1, self.value, self.slope, lambda slope: -self.touch(slope)),
            Piece(0.0, INFINITY, -1, self.value, self.slope, self.touch),
        )

    @abstractmethod
    def slope(self, x: Tensor) -> Tensor:
        """The derivative."""

    @abstractmethod
    def touch(self, slope: Tensor) -> Tensor:
        """The place right of 0 with this derivative."""

    def _widened(self, lower: Tensor, upper: Tensor, ends: tuple[Tensor, Tensor, Tensor, Tensor]) -> Lines:
        """Lines of (lower slope, upper slope, upper intercept, lower intercept), widened by the kernels' error."""
        error = self.kernel_error(lower, upper)
        lower_slope, upper_slope, above, below = ends
        return Lines(lower_slope, upper_slope, above + error, below - error, rising=True)


@dataclass(frozen=True, eq=False)
class Tanh(Saturating):
    """The hyperbolic tangent."""

    kind: ClassVar[str] = "tanh"

    def value(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def slope(self, x: Tensor) -> Tensor:
        return 1 - torch.tanh(x).square()

    def touch(self, slope: Tensor) -> Tensor:
        return _with_slope(slope)

    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        slope, intercept = _above_tanh(lower, upper)
        mirrored, below = _above_tanh(-upper, -lower)
        return self._widened(lower, upper, (mirrored, slope, intercept, -below))

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Tanh()


@dataclass(frozen=True, eq=False)
class Sigmoid(Saturating):
    """1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2."""

    kind: ClassVar[str] = "sigmoid"

    def value(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def slope(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.sigmoid(-x)

    def touch(self, slope: Tensor) -> Tensor:
        return 2 * _with_slope(4 * slope)

    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        slope, intercept = _above_tanh(lower / 2, upper / 2)
        mirrored, below = _above_tanh(-upper / 2, -lower / 2)
        return self._widened(lower, upper, (mirrored / 4, slope / 4, (1 + intercept) / 2, (1 - below) / 2))

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Sigmoid()


def _above_tanh(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, intercept) of a line above tanh: a chord, or a tangent at a point right of 0.

    The intercept is the maximum of tanh(x) - slope x for the slope as rounded, so the line is above the function even
    where rounding leads to a worse choice of slope.
    """
    at_lower, at_upper = torch.tanh(lower), torch.tanh(upper)

    def tangent(point: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.tanh(point)
        slope = 1 - value * value
        return slope, value - slope * point

    with torch.no_grad():
        low, high = torch.zeros_like(lower), upper.clamp(min=0)
        slope, intercept = tangent(high)
        # a tangent right of 0 is above the concave half; the chord if even the one at ``upper`` is below at ``lower``
        use_chord = (upper <= 0) | ((lower < 0) & (slope * lower + intercept < at_lower))
        for _ in range(30):
            middle = (low + high) / 2
            slope, intercept = tangent(middle)
            above = slope * lower + intercept >= at_lower
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        slope, intercept = tangent(high)
        # of the tangent's height at ``lower``, in its point
        derivative = (2 * torch.tanh(high) * slope * (high - lower)).clamp(min=1e-30)
    # the gradient of the point in ``lower``, by the implicit function theorem; the value does not change
    height = slope * lower + intercept - at_lower
    touching = high - (height - height.detach()) / derivative
    # tangents further right are above as well; the one in the middle has the smallest area
    slope, intercept = tangent(torch.maximum(touching, lower / 2 + upper / 2))
    width = upper - lower
    chord = torch.where(width > 0, (at_upper - at_lower) / torch.where(width > 0, width, 1.0), 1 - at_lower * at_lower)
    slope = torch.where(use_chord, chord, slope)
    # a chord's slope may round below 0; slopes are later divided by 2 and 4, which must be exact
    slope = torch.where(slope < 8 * torch.finfo(lower.dtype).tiny, 0.0, slope)
    intercept = torch.where(use_chord, at_lower - slope * lower, intercept)
    with torch.no_grad():
        lift = _largest_above(slope, lower, upper, at_lower, at_upper) - intercept
    return slope, intercept + lift


def _with_slope(slope: Tensor) -> Tensor:
    """The place right of 0 where tanh has this slope: atanh(sqrt(1 - slope))."""
    root = (1 - slope).clamp(min=0).sqrt()
    return torch.log1p(root) - slope.clamp(max=1).log() / 2


def _largest_above(slope: Tensor, lower: Tensor, upper: Tensor, at_lower: Tensor, at_upper: Tensor) -> Tensor:
    """Upper bound of tanh(x) - slope x on [lower, upper], for any slope >= 0.

    Left of 0 it is convex, so largest at an end; right of 0 it is concave, and largest where tanh has this slope, at
    atanh(sqrt(1 - slope)), clipped to the interval. An error of that point changes the maximum only to second order.
    """
    peak = torch.minimum(torch.maximum(_with_slope(slope), lower), upper)
    largest = torch.maximum(at_lower - slope * lower, at_upper - slope * upper)
    largest = torch.maximum(largest, torch.tanh(peak) - slope * peak)
    size = 1 + slope * torch.maximum(lower.abs(), upper.abs())
    return largest + ROUNDING * torch.finfo(lower.dtype).eps * size


@from_module(nn.Tanh)
def _tanh(tracing: Tracing, path: str, source: int, module: nn.Tanh) -> int:
    return tracing.append(Tanh(path, (source,)))


@from_function("tanh")
def _tanh_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Tanh(node.name, (source,)))


@from_module(nn.Sigmoid)
def _sigmoid(tracing: Tracing, path: str, source: int, module: nn.Sigmoid) -> int:
    return tracing.append(Sigmoid(path, (source,)))


@from_function("sigmoid")
def _sigmoid_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Sigmoid(node.name, (source,)))
