"""Differences f(z + d) - f(z) of an activation's values in two similar networks, enclosed in terms of z and d.

Two networks' values differ by far less than either varies over a box. Lines of each activation alone err by as much as
the values vary; planes in z and d by no more than d does (ReluDiff, arXiv 2001.03662; NeuroDiff, arXiv 2009.09943).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..interval import Bounds, Interval
from ..window import Window
from .base import Function, Nonlinear, clipped
from .entrywise import Entrywise
from .product import Plane, Planes, extremes

ROUNDING = 8
"""Planes of smooth functions are moved outward by this times eps and the size of their terms, for our roundings."""

Slopes = tuple[Tensor, Tensor]
"""A plane's slopes in z and in d, (B, *shape)."""
Choice = tuple[Plane, Plane, Plane]
"""The plane to start from, and two that parameters lead to."""


@dataclass(frozen=True, eq=False)
class ActivationDifference(Nonlinear):
    """f(z + d) - f(z), entry by entry, for an activation f: what it makes of a difference d of its inputs.

    Args:
        function: f, which is piecewise linear or has ``quotients``.
    """

    function: Entrywise

    kind: ClassVar[str] = "difference of two values of an activation"

    def __call__(self, z: Tensor, d: Tensor) -> Tensor:
        if not self.function.piecewise_linear:
            return self.function(z + d) - self.function(z)
        kink = self.function.kink
        return kink * d + (1 - kink) * _relu_difference(z, d)

    @property
    def piecewise_linear(self) -> bool:
        return False

    @property
    def rounding_is_bounded(self) -> bool:
        return self.function.piecewise_linear

    @property
    def adjustable(self) -> bool:
        return True

    def interval(self, z: Interval, d: Interval) -> Interval:
        """The range: exact for piecewise linear functions."""
        first, change = z.bounds(), d.bounds()
        if self.function.piecewise_linear:  # rises with d; rises with z where d > 0, falls where d < 0
            return Bounds(
                self(torch.where(change.lower >= 0, first.lower, first.upper), change.lower),
                self(torch.where(change.upper >= 0, first.upper, first.lower), change.upper),
            ).interval()
        low, high, error = self._between_quotients(first, change)
        by_mean = extremes(*(slope * end for slope in (low, high) for end in (change.lower, change.upper)))
        before, after = (self.function.interval(x).bounds() for x in (z, _sum(first, change).interval()))
        lower = torch.maximum(by_mean.lower - error, after.lower - before.upper)
        upper = torch.minimum(by_mean.upper + error, after.upper - before.lower)
        return Bounds(lower, torch.maximum(lower, upper)).interval()

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> Planes:
        """Planes: of some that touch the function the lowest above, and the highest below, at the box's centre. An
        ``alpha`` leads from these (1/2) to two others on each side (0 and 1)."""
        z, d = bounds
        sides = self._kinked_sides(z, d) if self.function.piecewise_linear else self._smooth_sides(z, d)
        if alpha is None:
            (below, *_), (above, *_) = sides
        else:
            below, above = (_mixed(*planes, alpha) for planes in sides)
        return Planes(below, above)

    def open(self, *bounds: Bounds) -> list[Tensor]:
        """The entries of which neither both values lie left of the kink nor both right of it."""
        z, d = bounds
        if not self.function.piecewise_linear:
            return [d.lower < d.upper] * 2
        moved = _sum(z, d)
        right, left = torch.minimum(z.lower, moved.lower) >= 0, torch.maximum(z.upper, moved.upper) <= 0
        open_ = ~(right | left)
        return [open_, open_]

    def unstable(self, *bounds: Bounds) -> list[Tensor]:
        """None: those of z are the activation's own."""
        return [torch.zeros_like(part) for part in self.open(*bounds)]

    def magnitude(self, z: Tensor, d: Tensor) -> Tensor:
        """Eight times the largest value: a plane's slopes are up to 2, and mixed ones have three roundings more."""
        return 8 * (z + d)

    def peak(self, *inputs: Tensor) -> Tensor:
        z, d = inputs
        return z + d

    def roundings(self, shape: torch.Size) -> int:
        return 4

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        return window if all(shape == shapes[0] for shape in shapes) else None

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)

    def _kinked_sides(self, z: Bounds, d: Bounds) -> Sequence[Choice]:
        """For each side, below and above, the plane to start from and two others."""
        kink, corners, boxes = self.function.kink, _corners(z, d), (z, d, _sum(z, d))
        sides: list[Choice] = []
        for side, slopes in ((-1, _slopes_below(*boxes)), (1, _slopes_above(*boxes))):
            first, second = (torch.stack(part) for part in zip(*slopes, strict=True))
            reach = _reach(side, first, second, corners)
            planes = [
                Plane((1 - kink) * p, kink + (1 - kink) * q, (1 - kink) * side * c)
                for p, q, c in zip(first, second, reach, strict=True)
            ]
            nearest, lowest = planes[0], side * _height(planes[0], z, d)
            for plane in planes[1:]:
                own = side * _height(plane, z, d)
                nearest, lowest = _where(own < lowest, plane, nearest), torch.minimum(own, lowest)
            sides.append((nearest, planes[-2], planes[-1]))
        return sides

    def _smooth_sides(self, z: Bounds, d: Bounds) -> Sequence[Choice]:
        """For each side the better of two planes, and both: by the mean value, and by lines of either value alone."""
        low, high, error = self._between_quotients(z, d)
        before, after = (self.function.relax(box) for box in (z, _sum(z, d)))
        assert before.lower_intercept is not None and after.lower_intercept is not None
        width = torch.where(d.upper > d.lower, d.upper - d.lower, 1.0)
        size = torch.maximum(z.lower.abs(), z.upper.abs()) + torch.maximum(d.lower.abs(), d.upper.abs())
        sides: list[Choice] = []
        for side in (-1, 1):
            most, least = (high, low) if side > 0 else (low, high)
            # the larger of most * d and least * d is convex: it lies below its chord
            left, right = torch.where(d.lower < 0, least, most), torch.where(d.upper > 0, most, least)
            slope = torch.where(left == right, left, (right * d.upper - left * d.lower) / width)
            spare = error + ROUNDING * torch.finfo(size.dtype).eps * size.detach() * (1 + slope.detach().abs())
            chord = Plane(torch.zeros_like(slope), slope, (left - slope) * d.lower + side * spare)
            if side > 0:
                own = after.upper_slope, after.upper_intercept, before.lower_slope, before.lower_intercept
            else:
                own = after.lower_slope, after.lower_intercept, before.upper_slope, before.upper_intercept
            spare = ROUNDING * torch.finfo(size.dtype).eps * (size.detach() + own[1].detach().abs() + 1)
            lines = Plane(own[0] - own[2], own[0], own[1] - own[3] + side * spare)
            at_chord, at_lines = (side * _height(plane, z, d) for plane in (chord, lines))
            sides.append((_where(at_chord <= at_lines, chord, lines), lines, chord))
        return sides

    def _between_quotients(self, z: Bounds, d: Bounds) -> tuple[Tensor, Tensor, Tensor]:
        """(low, high, error): f(z + d) - f(z) lies between low d and high d, up to what kernels are off by."""
        moved = _sum(z, d)
        whole = Bounds(torch.minimum(z.lower, moved.lower), torch.maximum(z.upper, moved.upper))
        quotients = self.function.quotients(whole)
        assert quotients is not None
        return quotients.lower, quotients.upper, 2 * self.function.kernel_error(whole.lower, whole.upper)


def _sum(z: Bounds, d: Bounds) -> Bounds:
    return Bounds(z.lower + d.lower, z.upper + d.upper)


def _middle(x: Bounds) -> Tensor:
    return x.lower / 2 + x.upper / 2


def _relu_difference(z: Tensor, d: Tensor) -> Tensor:
    """relu(z + d) - relu(z), without cancellation."""
    return torch.where(z >= 0, torch.maximum(d, -z), F.relu(z + d))


def _corners(z: Bounds, d: Bounds) -> Sequence[Slopes]:
    """Points (z, d) of the box, among them the corners of all parts on which relu(z + d) - relu(z) is affine: they are
    cut out by z = 0 and z + d = 0. So it takes its extremes, less an affine function, at these."""

    def within(x: Tensor, box: Bounds) -> Tensor:
        return torch.minimum(torch.maximum(x, box.lower), box.upper)

    kink = within(torch.zeros_like(z.lower), z)
    on_ends = [(first, end) for end in (d.lower, d.upper) for first in (z.lower, z.upper, kink, within(-end, z))]
    return [*on_ends, *((first, within(-first, d)) for first in (z.lower, z.upper, kink))]


def _reach(side: int, first: Tensor, second: Tensor, corners: Sequence[Slopes]) -> Tensor:
    """The largest ``side`` times (relu(z + d) - relu(z) - first z - second d) over a box."""
    largest = torch.full_like(first, -torch.inf)
    for z, d in corners:
        largest = torch.maximum(largest, side * (_relu_difference(z, d) - first * z - second * d))
    return largest


def _slopes_above(z: Bounds, d: Bounds, moved: Bounds) -> list[Slopes]:
    """Slopes of planes above relu(z + d) - relu(z), z + d in the box ``moved``: of the facets of its concave envelope
    where both values may have either sign, and of lines of either value; the last two are those that are steep in z."""
    zero, one = torch.zeros_like(z.lower), torch.ones_like(z.lower)
    chord = torch.where(d.lower >= 0, one, torch.where(d.upper <= 0, zero, d.upper / _width(d)))
    after, below = _line_above(moved), _line_above(z)
    below = torch.where((z.lower < 0) & (z.upper > 0), torch.where(z.upper > -z.lower, one, zero), below)
    falls, rises = z.lower < 0, z.upper > 0
    left, right = torch.where(falls, -z.lower, 1.0), torch.where(rises, z.upper, 1.0)
    steep = torch.where(falls, (d.upper.clamp(min=0) / left).clamp(max=1), 0.0)
    rising = torch.where(falls, (d.lower.clamp(min=0) / left).clamp(max=1), 0.0)
    falling = torch.where(rises, (d.lower.clamp(max=0) / right).clamp(min=-1), 0.0)
    return [(zero, chord), (zero, one), (zero, zero), (after - below, after), (steep, zero), (rising + falling, one)]


def _slopes_below(z: Bounds, d: Bounds, moved: Bounds) -> list[Slopes]:
    """The same from below: relu(z + d) - relu(z) is the negative of itself at z + d and -d."""
    slopes = _slopes_above(moved, Bounds(-d.upper, -d.lower), z)
    return [(-first, second - first) for first, second in slopes]


def _line_above(z: Bounds) -> Tensor:
    """The slope of the lowest line above relu."""
    return torch.where(z.lower >= 0, 1.0, torch.where(z.upper <= 0, 0.0, z.upper / _width(z)))


def _width(x: Bounds) -> Tensor:
    return torch.where(x.upper > x.lower, x.upper - x.lower, 1.0)


def _height(plane: Plane, z: Bounds, d: Bounds) -> Tensor:
    """The plane at the box's centre."""
    return plane.first * _middle(z) + plane.second * _middle(d) + plane.constant


def _where(chosen: Tensor, first: Plane, second: Plane) -> Plane:
    return Plane(
        torch.where(chosen, first.first, second.first), torch.where(chosen, first.second, second.second),
        torch.where(chosen, first.constant, second.constant),
    )  # fmt: skip


def _mixed(start: Plane, first: Plane, second: Plane, alpha: Tensor) -> Plane:
    """The plane at ``alpha``: ``first`` at 0, ``start`` at 1/2, ``second`` at 1, means of two of them between."""
    tilt = 2 * clipped(alpha) - 1

    def along(part: Callable[[Plane], Tensor]) -> Tensor:
        parts = part(start), part(first), part(second)
        at, low, high = (value.unsqueeze(1) if alpha.ndim > value.ndim else value for value in parts)
        change = torch.where(tilt < 0, at - low, torch.where(tilt > 0, high - at, (high - low) / 2))
        return at + tilt * change

    return Plane(along(lambda one: one.first), along(lambda one: one.second), along(lambda one: one.constant))
