"""Rows divided by the root of their mean square, or of their sum of squares.

y_i = d_i r with r = (w sum_j d_j^2 + eps)^-.5 (w is 1 / K, or 1 for a Euclidean norm). y_i rises with d_i, and towards
0 as the other entries grow, so intervals are exact. For lines, q = w sum_j d_j^2 is an operation of its own, whose
bounds by linear bounds are far tighter than those over the entries' box. r is convex and falls with q: it lies above a
tangent and below a chord, which stand for r in McCormick's planes of d_i and r. Where a Euclidean norm is kept above a
floor, y_i = d_i max(sum_j d_j^2, floor^2)^-.5; a row that may lie below it has constant lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..interval import Bounds, Interval
from ..relaxation import InputLines, Relaxation
from .base import Folding, Function, Nonlinear, Unbounded, UnsupportedOperation, clipped
from .product import Plane, Planes
from .rows import Rows

SMALLEST = 1e-18
"""The least floor of a norm: its square is still a normal number of float32."""
ROUNDING = 16
"""Intervals are moved outward by this, plus the number of summands, times eps and the size of their terms."""
LINES = 8
"""Lines are moved outward by this times eps and the size of their terms, those of sums by as many more as summands: a
summand's rounding in the kernel, and one in the constant. More would cost: 64 instead made the bounds of a ViT over a
radius of 0.001 wider by a twelfth."""


@dataclass(frozen=True, eq=False)
class RowNorm(Unbounded):
    """Rows divided by the root of their mean square, or of their sum of squares, plus ``eps`` inside of the root.

    Args:
        eps: > 0, or 0 with a floor.
        mean: whether squares are averaged.
        floor: the least that rows are divided by, 0 or >= ``SMALLEST``. Bounds hold as well for a division without a
            floor, by which a row of zeros stays one.
    """

    rows: Rows
    eps: float
    mean: bool = True
    floor: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        squares, scaled = self.parts()
        return scaled(x, squares(x))

    def interval(self, x: Interval) -> Interval:
        """The exact range over a box, with room for the kernels' roundings."""
        return self.rows.interval(self.parts()[1].over_box(self.rows.bounds(x)), x.center.shape[1:])

    def parts(self, *inputs: int) -> tuple[SquareSum, ByRootOf]:
        """The squares of the rows at ``inputs``, and what divides by them; their position is left out."""
        return SquareSum(self.path, inputs, self.rows, self.mean), ByRootOf(
            self.path, inputs, self.rows, self.eps, self.mean, self.floor
        )

    def fold(self, folding: Folding, *sources: int) -> int:
        squares, scaled = self.parts(*sources)
        return folding.append(replace(scaled, inputs=(*sources, folding.append(squares))))

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)

    def refusal(self) -> UnsupportedOperation:
        return UnsupportedOperation(f"{self.path}: found a norm of rows in linear bounds; accepted: a folded network")


def _weight(count: int, mean: bool) -> float:
    return 1 / count if mean else 1.0


def _squares(x: Bounds) -> tuple[Tensor, Tensor]:
    """The smallest and the largest squares of entries."""
    first, last = x.lower * x.lower, x.upper * x.upper
    inside = (x.lower <= 0) & (x.upper >= 0)
    return torch.where(inside, 0.0, torch.minimum(first, last)), torch.maximum(first, last)


class _OfFoldedRows(Nonlinear):
    """A part of a norm in a folded network."""

    @property
    def piecewise_linear(self) -> bool:
        return False

    def roundings(self, shape: torch.Size) -> int:
        return shape.numel() + 4

    def terms(self, shape: torch.Size) -> int:
        return shape.numel() + 1

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)


@dataclass(frozen=True, eq=False)
class SquareSum(_OfFoldedRows):
    """The mean, or the sum, of each row's squares, as rows of one number.

    Args:
        correction: what a mean takes off the number of squares.
    """

    rows: Rows
    mean: bool = True
    correction: int = 0

    kind: ClassVar[str] = "a mean of squares"

    def __call__(self, x: Tensor) -> Tensor:
        rows = self.rows.split(x)
        return (rows * rows).sum(-1, keepdim=True) * self._weight(rows.shape[-1])

    def _weight(self, count: int) -> float:
        if self.mean and count <= self.correction:
            raise UnsupportedOperation(
                f"{self.path}: found {count} entries; accepted: more than the correction, {self.correction}"
            )
        return _weight(count - self.correction, self.mean)

    def magnitude(self, x: Tensor) -> Tensor:
        return self(x)

    def peak(self, *inputs: Tensor) -> Tensor:
        """The sum before the division."""
        return self(*inputs) * (self.rows.split(inputs[0]).shape[-1] + 1)

    def interval(self, x: Interval) -> Interval:
        rows = self.rows.bounds(x)
        count = rows.lower.shape[-1]
        least, most = (end.sum(-1, keepdim=True) * self._weight(count) for end in _squares(rows))
        room = (ROUNDING + count) * torch.finfo(most.dtype).eps * most.detach()
        return Interval.from_bounds((least - room).clamp(min=0), most + room)

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> SquareLines:
        """Tangents in the middle of the box below, chords above."""
        x, shape = self.rows.bounds(bounds[0]), bounds[0].lower.shape[1:]
        weight, count = self._weight(x.lower.shape[-1]), x.lower.shape[-1]
        middle, reach = (x.lower + x.upper) / 2, torch.maximum(x.lower.abs(), x.upper.abs())
        room = (LINES + count) * torch.finfo(middle.dtype).eps * weight * (reach * reach).sum(-1, keepdim=True)
        room = (room + torch.finfo(middle.dtype).tiny).detach()
        below = -weight * (middle * middle).sum(-1, keepdim=True) - room
        above = -weight * (x.lower * x.upper).sum(-1, keepdim=True) + room
        return SquareLines(2 * weight * middle, weight * (x.lower + x.upper), below, above, self.rows, shape)


@dataclass(frozen=True)
class SquareLines(Relaxation):
    """A sum over each row between two linear functions of the row.

    Args:
        lower, upper: (B, …, K), slopes; below, above: (B, …, 1), constants.
        rows: how values of the input's ``shape`` fall into rows.
    """

    lower: Tensor
    upper: Tensor
    below: Tensor
    above: Tensor
    rows: Rows
    shape: torch.Size

    def map(self, function: Callable[[Tensor], Tensor]) -> SquareLines:
        slopes, constants = (function(self.lower), function(self.upper)), (function(self.below), function(self.above))
        return SquareLines(*slopes, *constants, self.rows, self.shape)

    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        positive, negative = forms.clamp(min=0), forms.clamp(max=0)
        lower, upper, below, above = (p.unsqueeze(1) for p in (self.lower, self.upper, self.below, self.above))
        through = positive * lower + negative * upper
        constants = constants + (positive * below + negative * above).flatten(2).sum(-1)
        return (self.rows.join_forms(through, self.shape),), constants

    def forward(self, *inputs: InputLines) -> InputLines:
        low, high = self.rows.split_forms(inputs[0].lower), self.rows.split_forms(inputs[0].upper)

        def through(slopes: Tensor, same: Tensor, other: Tensor) -> Tensor:
            slopes = slopes.unsqueeze(1)
            return (slopes.clamp(min=0) * same + slopes.clamp(max=0) * other).sum(-1, keepdim=True)

        lower, upper = through(self.lower, low, high), through(self.upper, high, low)
        lower[:, -1] += self.below
        upper[:, -1] += self.above
        return InputLines(lower, upper)


@dataclass(frozen=True, eq=False)
class ByRootOf(_OfFoldedRows):
    """Rows d divided by the root of q + ``eps``, for the rows and their ``SquareSum`` q.

    Args:
        floor: as in ``RowNorm``; then they are divided by the root of the larger of q and floor^2.
    """

    rows: Rows
    eps: float
    mean: bool = True
    floor: float = 0.0

    kind: ClassVar[str] = "a division by a row's own size"

    @property
    def adjustable(self) -> bool:
        return True

    def __call__(self, x: Tensor, squares: Tensor) -> Tensor:
        return self.rows.join(self.rows.split(x) * self._factor(squares), x.shape[1:])

    def magnitude(self, x: Tensor, squares: Tensor) -> Tensor:
        """Whatever the squares: a row of K entries times its factor is at most sqrt(K), or 1 without a mean."""
        most = self.rows.split(x).shape[-1] ** 0.5 if self.mean else 1.0
        return (x / (self.floor or self.eps**0.5)).clamp(max=1.01 * most)

    def _factor(self, squares: Tensor) -> Tensor:
        return (squares.clamp(min=self.floor**2) if self.floor else squares + self.eps).rsqrt()

    def _may_be_tiny(self, least: Tensor) -> Tensor:
        """Whether rows, whose squares sum to ``least`` at least, may be as small as the floor."""
        return least <= 2 * self.floor**2

    def over_box(self, x: Bounds) -> Interval:
        """The range of rows over a box of rows, exact up to room for the kernels' roundings."""
        count, unit = x.lower.shape[-1], torch.finfo(x.lower.dtype).eps
        weight, error = _weight(count, self.mean), (ROUNDING + count) * unit
        least, most = _squares(x)
        room = (error * most.sum(-1, keepdim=True)).detach()
        few = (least.sum(-1, keepdim=True) - least - room).clamp(min=0)
        many = most.sum(-1, keepdim=True) - most + room

        def value(d: Tensor, others: Tensor) -> Tensor:
            return d * self._factor(weight * (d * d + others))

        low = value(x.lower, torch.where(x.lower >= 0, many, few))
        high = value(x.upper, torch.where(x.upper >= 0, few, many))
        if self.floor:
            tiny = self._may_be_tiny(least.sum(-1, keepdim=True)) & (most > 0)
            low, high = torch.where(tiny & (x.lower < 0), -1.0, low), torch.where(tiny & (x.upper > 0), 1.0, high)
        return Interval.from_bounds(low - (error * low.abs()).detach(), high + (error * high.abs()).detach())

    def interval(self, x: Interval, squares: Interval) -> Interval:
        """The tighter of the range over the box of ``x``, and of the corners' products."""
        rows = self.rows.bounds(x)
        box = self.over_box(rows)
        error = LINES * torch.finfo(rows.lower.dtype).eps
        small, large = self._factor(squares.upper) * (1 - error), self._factor(squares.lower.clamp(min=0)) * (1 + error)
        low = rows.lower * torch.where(rows.lower >= 0, small, large)
        high = rows.upper * torch.where(rows.upper >= 0, large, small)
        lower, upper = torch.maximum(box.lower, low), torch.minimum(box.upper, high)
        if self.floor:  # without a floor the factor of tiny rows is larger
            tiny = self._may_be_tiny(squares.lower)
            lower, upper = torch.where(tiny, box.lower, lower), torch.where(tiny, box.upper, upper)
        return self.rows.interval(Interval.from_bounds(lower, torch.maximum(lower, upper)), x.center.shape[1:])

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> RowPlanes:
        """McCormick's planes of d and r, on each side the one that is tighter in the middle of the box, or its mix with
        the other one by an ``alpha``."""
        x, q, shape = self.rows.bounds(bounds[0]), bounds[1], bounds[0].lower.shape[1:]
        lower, upper = x.lower, x.upper
        middle, reach = (lower + upper) / 2, torch.maximum(lower.abs(), upper.abs())
        spare = LINES * torch.finfo(lower.dtype).eps
        first, last = q.lower.clamp(min=0), q.upper.clamp(min=0)
        tiny = self._may_be_tiny(first) if self.floor else None
        if tiny is not None:
            first, last = torch.where(tiny, 1.0, first), torch.where(tiny, 1.0, last)
        place = (first + last) / 2
        # r from below: the tangent at the middle, of slope < 0
        at = self._factor(place)
        fall = -at / (place + self.eps) / 2
        low = at - fall * place - (spare * (at - fall * (place + last))).detach()
        # r from above: the chord, as -1 / (r r' (r + r')) without cancellation
        smallest, largest = self._factor(last), self._factor(first)
        chord = -smallest * largest / (1 / smallest + 1 / largest)
        high = largest - chord * first + (spare * (largest - chord * (first + last))).detach()
        smallest, largest = smallest * (1 - spare), largest * (1 + spare)
        terms = reach * (largest - (fall + chord) * last + low.abs() + high.abs())
        room = (spare * terms).detach()

        def plane(below: bool, end: Tensor, factor: Tensor) -> tuple[Plane, Tensor]:
            """factor d + end r - end factor, with lines for r; and its value in the middle."""
            from_below = end.clamp(min=0) if below else end.clamp(max=0)
            from_above = end - from_below
            slope, constant = from_below * fall + from_above * chord, from_below * low + from_above * high
            constant = constant - end * factor + (-room if below else room)
            factor = factor.expand_as(end)
            return Plane(factor, slope, constant), factor * middle + slope * place + constant

        given = (
            None
            if alpha is None
            else (self.rows.split_forms(alpha) if alpha.ndim > len(shape) + 1 else self.rows.split(alpha))
        )
        under = _mixed(True, given, plane(True, lower, smallest), plane(True, upper, largest))
        over = _mixed(False, given, plane(False, lower, largest), plane(False, upper, smallest))
        if tiny is not None:
            ends = self.rows.bounds(self.interval(*(one.interval() for one in bounds)))
            under, over = _constant_where(tiny, under, ends.lower), _constant_where(tiny, over, ends.upper)
        return RowPlanes(Planes(under, over, (lower.shape[1:], q.lower.shape[1:])), self.rows, shape)


def _constant_where(chosen: Tensor, plane: Plane, value: Tensor) -> Plane:
    """The plane; where ``chosen``, one of this value."""
    if plane.first.ndim > value.ndim:
        chosen, value = chosen.unsqueeze(1), value.unsqueeze(1)
    zero = torch.zeros_like(value)
    pairs = (zero, plane.first), (zero, plane.second), (value, plane.constant)
    return Plane(*(torch.where(chosen, new, old) for new, old in pairs))


def _mixed(below: bool, alpha: Tensor | None, one: tuple[Plane, Tensor], other: tuple[Plane, Tensor]) -> Plane:
    """The better plane in the middle; by parameters below 1/2 mixed with the other one."""
    better = one[1] >= other[1] if below else one[1] <= other[1]
    pairs = [(getattr(one[0], name), getattr(other[0], name)) for name in ("first", "second", "constant")]
    if alpha is None:
        return Plane(*(torch.where(better, a, b) for a, b in pairs))
    if alpha.ndim > better.ndim:
        better, pairs = better.unsqueeze(1), [(a.unsqueeze(1), b.unsqueeze(1)) for a, b in pairs]
    share = clipped(2 * alpha)
    return Plane(*(torch.where(better, b + share * (a - b), a + share * (b - a)) for a, b in pairs))


@dataclass(frozen=True)
class RowPlanes(Relaxation):
    """Planes around a function of rows and of one number of each row.

    Args:
        planes: over the rows.
        rows: how values of ``shape`` fall into rows.
    """

    planes: Planes
    rows: Rows
    shape: torch.Size

    def map(self, function: Callable[[Tensor], Tensor]) -> RowPlanes:
        return RowPlanes(self.planes.map(function), self.rows, self.shape)

    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (through, squares), constants = self.planes.backward(self.rows.split_forms(forms), constants)
        return (self.rows.join_forms(through, self.shape), squares), constants

    def forward(self, *inputs: InputLines) -> InputLines:
        x, squares = inputs
        split = InputLines(self.rows.split_forms(x.lower), self.rows.split_forms(x.upper))
        lines = self.planes.forward(split, squares)
        return InputLines(*(self.rows.join_forms(end, self.shape) for end in (lines.lower, lines.upper)))
