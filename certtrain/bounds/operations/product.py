"""Products and quotients of two computed values, enclosed by McCormick's planes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from ..interval import Bounds, Interval
from ..relaxation import InputLines, Lines, Relaxation
from ..window import Window
from .base import Function, Nonlinear, UnsupportedOperation, summed_onto
from .elementary import Power
from .registry import Tracing, from_function

ROUNDING = 8
"""Planes are moved outward by this times eps and the size of their terms over the box, for the roundings of their
coefficients and of the kernels' product or quotient (two or three for each term)."""


@dataclass(frozen=True)
class Plane:
    """``first`` x + ``second`` y + ``constant``, entry by entry, each (B, *shape) or (B, R, *shape)."""

    first: Tensor
    second: Tensor
    constant: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Plane:
        return Plane(function(self.first), function(self.second), function(self.constant))


@dataclass(frozen=True)
class Planes(Relaxation):
    """A plane below and one above a function of two values, entry by entry.

    Args:
        shapes: of the two values, if they broadcast; None if both have the output's.
    """

    lower: Plane
    upper: Plane
    shapes: tuple[torch.Size, torch.Size] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Planes:
        return Planes(self.lower.map(function), self.upper.map(function), self.shapes)

    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        above, below = forms.clamp(min=0), forms.clamp(max=0)
        low, high = (plane.map(lambda x: _for_forms(x, forms)) for plane in (self.lower, self.upper))
        first, second = above * low.first + below * high.first, above * low.second + below * high.second
        constant = (above * low.constant + below * high.constant).flatten(2).sum(-1)
        if self.shapes is not None:
            first, second = summed_onto(first, self.shapes[0]), summed_onto(second, self.shapes[1])
        return (first, second), constants + constant

    def forward(self, *inputs: InputLines) -> InputLines:
        x, y = inputs
        low, high = self.lower.map(lambda v: v.unsqueeze(1)), self.upper.map(lambda v: v.unsqueeze(1))
        lower = _combined(low, x.lower, x.upper, y.lower, y.upper)
        upper = _combined(high, x.upper, x.lower, y.upper, y.lower)
        lower[:, -1] += self.lower.constant
        upper[:, -1] += self.upper.constant
        return InputLines(lower, upper)


def _for_forms(x: Tensor, forms: Tensor) -> Tensor:
    return x if x.ndim == forms.ndim else x.unsqueeze(1)


def _combined(plane: Plane, x: Tensor, other_x: Tensor, y: Tensor, other_y: Tensor) -> Tensor:
    """The plane over lines, without its constant: ``x`` and ``y`` where a slope is positive, else the others."""
    up = plane.first.clamp(min=0) * x + plane.second.clamp(min=0) * y
    return up + plane.first.clamp(max=0) * other_x + plane.second.clamp(max=0) * other_y


@dataclass(frozen=True, eq=False)
class _OfTwo(Nonlinear):
    """A function of two values that broadcast against each other."""

    @property
    def piecewise_linear(self) -> bool:
        return False

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        return window if all(shape == shapes[0] for shape in shapes) else None

    def roundings(self, shape: torch.Size) -> int:
        return 1

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> Planes:
        """Planes; an ``alpha`` mixes the two of McCormick's on each side (1 and 0), None is their mean."""
        x, y = bounds
        planes = self.planes(x, y, alpha)
        shapes = x.lower.shape[1:], y.lower.shape[1:]
        return planes if shapes[0] == shapes[1] else replace(planes, shapes=shapes)

    def planes(self, x: Bounds, y: Bounds, alpha: Tensor | None) -> Planes:
        """Planes over boxes that broadcast, with coefficients of the output's shape."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Product(_OfTwo):
    """Two computed values, multiplied entry by entry."""

    kind: ClassVar[str] = "product of two computed values"

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def interval(self, x: Interval, y: Interval) -> Interval:
        """The range over all corners."""
        return extremes(*(a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)))

    def planes(self, x: Bounds, y: Bounds, alpha: Tensor | None) -> Planes:
        return mccormick(x, y, alpha)

    def magnitude(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(torch.mul)


def extremes(*corners: Tensor) -> Interval:
    """The interval of the smallest and the largest of values; 0 times infinity counts as 0."""
    stacked = torch.stack([torch.where(corner.isnan(), 0.0, corner) for corner in corners])
    invalid = torch.stack([corner.isnan() for corner in corners]).all(0)
    lower = torch.where(invalid, torch.nan, stacked.amin(0))
    return Interval.from_bounds(lower, stacked.amax(0))


def mccormick(x: Bounds, y: Bounds, alpha: Tensor | None) -> Planes:
    """The planes around x y. With centers c, radii r and s = 2 alpha - 1 in [-1, 1], below:
    (c_y - s r_y) x + (c_x - s r_x) y - c_x c_y - r_x r_y + s (c_x r_y + r_x c_y), and above
    (c_y + s r_y) x + (c_x - s r_x) y - c_x c_y + r_x r_y - s (c_x r_y - r_x c_y).
    """
    boxes = x.interval(), y.interval()
    (cx, rx), (cy, ry) = ((box.center, box.radius) for box in boxes)
    middle, corner = cx * cy, rx * ry
    size = (cx.abs() + rx) * (cy.abs() + ry)
    spare = ROUNDING * torch.finfo(size.dtype).eps * size.detach() + torch.finfo(size.dtype).tiny
    first, second = cy.expand_as(middle), cx.expand_as(middle)
    if alpha is None:
        return Planes(Plane(first, second, -middle - corner - spare), Plane(first, second, corner - middle + spare))
    side = 2 * alpha.clamp(0, 1) - 1
    if alpha.ndim > middle.ndim:
        cx, rx, cy, ry, middle, corner, spare = (v.unsqueeze(1) for v in (cx, rx, cy, ry, middle, corner, spare))
    falling, rising = side * cx * ry, side * rx * cy
    return Planes(
        Plane(cy - side * ry, cx - side * rx, falling + rising - middle - corner - spare),
        Plane(cy + side * ry, cx - side * rx, rising - falling - middle + corner + spare),
    )


@dataclass(frozen=True, eq=False)
class Quotient(_OfTwo):
    """One computed value divided by another, entry by entry; without bounds where the divisor may be 0."""

    kind: ClassVar[str] = "quotient of two computed values"
    partial: ClassVar[bool] = True

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return x / y

    def interval(self, x: Interval, y: Interval) -> Interval:
        """The range over all corners; everything where the divisor may be 0."""
        known = ~((y.lower <= 0) & (y.upper >= 0))
        low, high = (torch.where(known, end, 1.0) for end in (y.lower, y.upper))
        inside = extremes(*(a / b for a in (x.lower, x.upper) for b in (low, high)))
        known = known.expand_as(inside.center)
        return Interval(torch.where(known, inside.center, 0.0), torch.where(known, inside.radius, torch.inf))

    def planes(self, x: Bounds, y: Bounds, alpha: Tensor | None) -> Planes:
        """McCormick's planes of x and 1 / y, with 1 / y replaced by its tangent or its chord, by its factor's sign."""
        ends, lines = reciprocal(y)
        known = ends.upper.isfinite() & ends.lower.isfinite()
        outer = mccormick(x, Bounds(*(torch.where(known, end, 1.0) for end in (ends.lower, ends.upper))), alpha)

        def through(plane: Plane, below: bool) -> Plane:
            line = [lines.lower_slope, lines.lower_intercept, lines.upper_slope, lines.upper_intercept]
            if plane.second.ndim > lines.lower_slope.ndim:
                line = [None if part is None else part.unsqueeze(1) for part in line]
            low_slope, low, high_slope, high = line
            assert low is not None and low_slope is not None and high_slope is not None and high is not None
            lower_one = (plane.second >= 0) == below
            slope, shift = torch.where(lower_one, low_slope, high_slope), torch.where(lower_one, low, high)
            sure = known.unsqueeze(1) if plane.second.ndim > known.ndim else known
            unknown = -torch.inf if below else torch.inf
            return Plane(
                torch.where(sure, plane.first, 0.0),
                torch.where(sure, plane.second * slope, 0.0),
                torch.where(sure, plane.constant + plane.second * shift, unknown),
            )

        return Planes(through(outer.lower, True), through(outer.upper, False))

    def magnitude(self, x: Tensor, y: Tensor) -> Tensor:
        return x / y

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(torch.div)


def reciprocal(y: Bounds) -> tuple[Bounds, Lines]:
    """(range, lines) of 1 / y: infinite where y may be 0."""
    mirrored = y.upper < 0
    low, high = torch.where(mirrored, -y.upper, y.lower), torch.where(mirrored, -y.lower, y.upper)
    known = low > 0
    low, high = torch.where(known, low, 1.0), torch.where(known, high, 1.0)
    eps = torch.finfo(low.dtype).eps
    # over positive numbers: the tangent where it is lowest at both ends alike, at sqrt(low high), and the chord
    place = (low.sqrt() * high.sqrt()).clamp(min=low.detach()).minimum(high)
    slope, chord = -(1 / place) / place, -(1 / low) / high
    error = 8 * eps / low.detach()
    below, above = 2 / place - error, 1 / low + 1 / high + error
    infinite = torch.where(known, 0.0, torch.inf)
    slope, chord = torch.where(known, slope, 0.0), torch.where(known, chord, 0.0)
    intercepts = torch.where(mirrored, -above, below), torch.where(mirrored, -below, above)
    slopes = torch.where(mirrored, chord, slope), torch.where(mirrored, slope, chord)
    least, most = 1 / high * (1 - 2 * eps) - infinite, 1 / low * (1 + 2 * eps) + infinite
    ends = Bounds(torch.where(mirrored, -most, least), torch.where(mirrored, -least, most))
    return ends, Lines(slopes[0], slopes[1], intercepts[1], intercepts[0])


@from_function("mul")
def _mul(tracing: Tracing, node: fx.Node, source: int) -> int:
    other = tracing.position(node, node.args[1])
    return tracing.append(Power(node.name, (source,), 2.0) if other == source else Product(node.name, (source, other)))


@from_function("div", "truediv")
def _div(tracing: Tracing, node: fx.Node, source: int) -> int:
    if node.kwargs.get("rounding_mode") is not None:
        raise UnsupportedOperation(f"div at {node.name!r}: found a rounding mode; accepted: none")
    return tracing.append(Quotient(node.name, (source, tracing.position(node, node.args[1]))))
