"""Functions of one number, given piece by piece: their ranges, and lines that enclose them.

On each piece a function is convex, concave or straight, so for any slope s the largest and the smallest f(x) - s x of
an interval are known: at a piece's ends, or where the derivative is s. Soundness needs only that. The search for good
slopes may go wrong without harm: the line's constant is computed for the slope that came out.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..interval import Bounds
from ..relaxation import Lines, Relaxation
from .base import clipped
from .entrywise import Entrywise

ROUNDING = 8
"""Lines are moved outward by this times eps and the size of f(x) and slope times x, for our own roundings."""
BRIDGES = 8
"""Steps of the search for a line's slope; each takes the chord between two points that earlier ones touched."""

INFINITY = math.inf
Formula = Callable[[Tensor], Tensor]


def flat(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a function between two places, on which it is convex, concave or straight.

    Args:
        start, end: numbers, or tensors that broadcast with the interval's ends; ``start > end`` for no piece.
        bend: 1 where it is convex, -1 where it is concave, 0 where it is straight.
        value, slope: the function and its derivative on the piece, limits at its ends.
        touch: slope → the place with this derivative; need not be exact, and may be anything where there is none.
            Unused where ``bend`` is 0.
    """

    start: float | Tensor
    end: float | Tensor
    bend: int
    value: Formula
    slope: Formula
    touch: Formula = flat


@dataclass(frozen=True)
class _Extreme:
    """Where ``side`` times (f(x) - slope x) is largest, f there, and an upper bound of that largest number."""

    place: Tensor
    value: Tensor
    reach: Tensor

    def or_at(self, place: Tensor, value: Tensor, reach: Tensor, there: Tensor) -> _Extreme:
        """This one, or a larger one at ``place`` where it is ``there``."""
        wins = there & (reach > self.reach)
        pairs = (place, self.place), (value, self.value), (reach, self.reach)
        return _Extreme(*(torch.where(wins, new, old) for new, old in pairs))


class Pieced(Entrywise):
    """A function given by its pieces, whose lines may be tilted."""

    differentiable: ClassVar[bool] = False
    """Whether it is known to have a derivative of moderate size everywhere, for ``quotients``."""

    @abstractmethod
    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        """Pieces that cover [lower, upper]; of many alike, those among which extremes can lie."""

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The scale of kernels' errors on [lower, upper], at least the largest |f|."""
        ends = torch.maximum(self.value(lower).abs(), self.value(upper).abs())
        return ends.clamp(min=1)

    def quotients(self, x: Bounds) -> Bounds | None:
        """The derivative's range: on each piece it is monotone. Without jumps, its values enclose all quotients."""
        if not self.differentiable:
            return None
        low, high = torch.full_like(x.lower, torch.inf), torch.full_like(x.lower, -torch.inf)
        for piece in self.pieces(x.lower, x.upper):
            start, end = torch.clamp(x.lower, min=piece.start), torch.clamp(x.upper, max=piece.end)
            for place in (start, end):
                slope = piece.slope(place)
                low = torch.where(start <= end, torch.minimum(low, slope), low)
                high = torch.where(start <= end, torch.maximum(high, slope), high)
        spare = 2 * ROUNDING * torch.finfo(x.lower.dtype).eps
        return Bounds(low - spare, high + spare)

    @property
    def adjustable(self) -> bool:
        return True

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> Lines:
        lines = super().relax(*bounds)
        return lines if alpha is None or not self.adjustable else self.adjusted(lines, bounds, alpha)

    def adjusted(self, relaxation: Relaxation, bounds: Sequence[Bounds], alpha: Tensor) -> Lines:
        """Lines of other slopes, each as near to the function as its slope allows. Parameters below 1/2 lead from the
        default slope to the smallest that a line may need, those above 1/2 to the largest (the places of tangents in
        alpha-CROWN, arXiv 2011.13824, and GenBaB, arXiv 2405.21063)."""
        assert isinstance(relaxation, Lines) and relaxation.lower_intercept is not None
        (x,) = bounds
        per_form = alpha.ndim > x.lower.ndim
        with torch.no_grad():
            lower, upper, low, high, below, above = (
                part.unsqueeze(1) if per_form else part
                for part in (x.lower, x.upper, relaxation.lower_slope, relaxation.upper_slope,
                             relaxation.lower_intercept, relaxation.upper_intercept)
            )  # fmt: skip
            pieces, largest = self.pieces(lower, upper), torch.maximum(lower.abs(), upper.abs())
            room = self.kernel_error(lower, upper) + ROUNDING * torch.finfo(lower.dtype).eps * self.size(lower, upper)
        sides: list[tuple[Tensor, Tensor]] = []
        for side, slope, constant in ((-1, low, below), (1, high, above)):
            tilt = 2 * clipped(alpha) - 1
            fall, rise = _spans(pieces, self.value, lower, upper, slope, side)
            span = torch.where(tilt < 0, fall, torch.where(tilt > 0, rise, (fall + rise) / 2))
            tilted = slope + tilt * span
            with torch.no_grad():
                found = _extreme(pieces, lower, upper, tilted, side)
                spare = room + ROUNDING * torch.finfo(lower.dtype).eps * tilted.abs() * largest
                reach = torch.where(tilt == 0, constant, side * (found.reach + spare))
            sides.append((tilted, reach - (tilted - tilted.detach()) * found.place))
        return Lines(sides[0][0], sides[1][0], sides[1][1], sides[0][1])


@torch.no_grad()
def _spans(
    pieces: Sequence[Piece], value: Formula, lower: Tensor, upper: Tensor, slope: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """How far the slope of a line above (``side`` 1) or below (-1) a function may fall and rise on: to the function's
    own slopes at the ends, or the chord's where it bends the other way; 0 where these are not finite."""
    at_lower, at_upper = _slope_at(pieces, lower), _slope_at(pieces, upper)
    chord = _chord(lower, upper, value(lower), value(upper), slope)
    least, most = (at_lower, at_upper) if side < 0 else (at_upper, at_lower)
    fall, rise = slope - torch.minimum(least, chord), torch.maximum(most, chord) - slope
    fall, rise = (torch.where(span.isfinite(), span, 0.0).clamp(min=0) for span in (fall, rise))
    return fall, rise


@dataclass(frozen=True, eq=False)
class ScalarCurve(Pieced):
    """A function given by its pieces. Where it has no value, its range and lines are NaN, which prove nothing."""

    error: ClassVar[float]
    """Largest error of kernels, in eps of ``size`` (``scripts/measure_activations.py``)."""
    rises: ClassVar[bool] = False
    """Whether it never falls, so that its range lies between its values at the ends."""

    def defined(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Whether the function has a finite value everywhere on [lower, upper]."""
        return (lower == lower) & (upper == upper)

    def kernel_error(self, lower: Tensor, upper: Tensor) -> Tensor:
        lower, upper, info = lower.detach(), upper.detach(), torch.finfo(lower.dtype)
        return self.error * info.eps * self.size(lower, upper) + (info.tiny if self.error else 0.0)

    def image(self, x: Bounds) -> Bounds:
        lower, upper = x.lower, x.upper
        if self.rises:
            low, high = self.value(lower), self.value(upper)
        else:
            pieces = self.pieces(lower.detach(), upper.detach())
            low, high = (self._extreme_value(pieces, lower, upper, side) for side in (-1, 1))
        known = self.defined(lower, upper)
        return Bounds(torch.where(known, low, torch.nan), torch.where(known, high, torch.nan))

    def _extreme_value(self, pieces: Sequence[Piece], lower: Tensor, upper: Tensor, side: int) -> Tensor:
        """The largest (``side`` 1) or smallest (-1) value on [lower, upper], with the gradient of an end's."""
        with torch.no_grad():
            found = _extreme(pieces, lower, upper, None, side)
            constant = side * found.reach
        at_end = torch.where(found.place == lower, lower, torch.where(found.place == upper, upper, found.place))
        own = self.value(at_end)
        return constant + torch.where(own.isfinite(), own - own.detach(), 0.0)

    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        with torch.no_grad():
            pieces, known = self.pieces(lower, upper), self.defined(lower, upper)
            largest = torch.maximum(lower.abs(), upper.abs())
            eps, size, error = torch.finfo(lower.dtype).eps, self.size(lower, upper), self.kernel_error(lower, upper)
        sides: list[tuple[Tensor, Tensor]] = []
        for side in (-1, 1):
            slope, constant = self._line(pieces, lower, upper, side)
            with torch.no_grad():
                spare = error + ROUNDING * eps * (size + slope.abs() * largest)
                spare = torch.where(known, spare, torch.nan)
            sides.append((slope, constant + side * spare))
        (lower_slope, below), (upper_slope, above) = sides
        return Lines(lower_slope, upper_slope, above, below)

    def _line(self, pieces: Sequence[Piece], lower: Tensor, upper: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """(slope, constant) of a line above (``side`` 1) or below (-1) the function, without room for roundings.

        The line nearest to the function at the interval's middle has the smallest area among all: its tangent there, or
        the chord between two points that it touches on either side, which are found by turns.
        """
        middle = lower / 2 + upper / 2
        tangent = _slope_at(pieces, middle)
        tangent = torch.where(tangent.isfinite(), tangent, 0.0)
        with torch.no_grad():
            first, last, at_first, at_last = lower, upper, self.value(lower), self.value(upper)
            for _ in range(BRIDGES if len(pieces) > 1 else 0):
                found = _extreme(pieces, lower, upper, _chord(first, last, at_first, at_last, tangent), side)
                left = found.place <= middle
                first, at_first = torch.where(left, found.place, first), torch.where(left, found.value, at_first)
                last, at_last = torch.where(left, last, found.place), torch.where(left, at_last, found.value)
            chord = _chord(first, last, at_first, at_last, tangent)
            heights = [
                side * middle * slope + _extreme(pieces, lower, upper, slope, side).reach for slope in (chord, tangent)
            ]
            straight = heights[0] < heights[1]
            from_lower, to_upper = first == lower, last == upper
        first, at_first = torch.where(from_lower, lower, first), torch.where(from_lower, self.value(lower), at_first)
        last, at_last = torch.where(to_upper, upper, last), torch.where(to_upper, self.value(upper), at_last)
        slope = torch.where(straight, _chord(first, last, at_first, at_last, tangent), tangent)
        touched, value = torch.where(straight, first, middle), torch.where(straight, at_first, self.value(middle))
        constant = value - slope * touched
        with torch.no_grad():
            lift = side * _extreme(pieces, lower, upper, slope, side).reach - constant
        return slope, constant + lift


def _chord(first: Tensor, last: Tensor, at_first: Tensor, at_last: Tensor, otherwise: Tensor) -> Tensor:
    """The slope between two points; ``otherwise`` where they are the same or it is not finite."""
    width = last - first
    slope = (at_last - at_first) / torch.where(width > 0, width, 1.0)
    return torch.where((width > 0) & slope.isfinite(), slope, otherwise)


def _slope_at(pieces: Sequence[Piece], place: Tensor) -> Tensor:
    found = torch.zeros_like(place)
    for piece in pieces:
        found = torch.where((piece.start <= place) & (place <= piece.end), piece.slope(place), found)
    return found


def _extreme(pieces: Sequence[Piece], lower: Tensor, upper: Tensor, slope: Tensor | None, side: int) -> _Extreme:
    """The extreme of f(x) - slope x on [lower, upper]; a slope of None is 0, and takes infinite ends."""
    minus_infinity = torch.full_like(lower, -torch.inf)
    best = _Extreme(lower, torch.zeros_like(lower), minus_infinity)

    def tilted(value: Tensor, place: Tensor) -> Tensor:
        return side * (value if slope is None else value - slope * place)

    for piece in pieces:
        start, end = torch.clamp(lower, min=piece.start), torch.clamp(upper, max=piece.end)
        there = start <= end

        if side * piece.bend >= 0:  # largest at an end
            for place in (start, end):
                value = piece.value(place)
                best = best.or_at(place, value, tilted(value, place), there)
            continue
        wanted = torch.zeros_like(start) if slope is None else slope
        at_start, at_end = side * (piece.slope(start) - wanted), side * (piece.slope(end) - wanted)
        place = torch.minimum(torch.maximum(piece.touch(wanted), start), end)
        place = torch.where(at_start <= 0, start, torch.where(at_end >= 0, end, place))
        value = piece.value(place)
        rise = side * (piece.slope(place) - wanted)  # the tangent's, over the piece; 0 but for roundings, or at an end
        over = [torch.where(place == other, 0.0, rise * (other - place)) for other in (start, end)]
        over = torch.where(rise == 0, 0.0, torch.maximum(*over).clamp(min=0))
        best = best.or_at(place, value, tilted(value, place) + over, there)
    return best


def halved(derivative: Formula, start: float, end: float) -> Formula:
    """A ``touch`` by bisection, for a derivative that rises from ``start`` to ``end``."""

    def touch(slope: Tensor) -> Tensor:
        low, high = torch.full_like(slope, start), torch.full_like(slope, end)
        for _ in range(25):
            middle = (low + high) / 2
            below = derivative(middle) < slope
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low

    return touch
