"""Normalisations of rows by their own statistics: layer, group, instance and RMS norms, and Euclidean norms.

A row is centered first, if its mean is taken away, which is linear. Then y_i = d_i r with r = (w sum_j d_j^2 + eps)^-.5
(w is 1 / K, or 1 for a Euclidean norm). y_i rises with d_i, and towards 0 as the other entries grow, so intervals are
exact. For lines, r is convex and falls with q = w sum_j d_j^2, and q is convex: r lies above the tangent of r(q) at the
sum of the squares' chords, and below the chord of r(q) at the sum of their tangents. These stand for r in McCormick's
planes of d_i and r, of which each entry takes those that are tighter in the middle of the box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..interval import Bounds, Interval
from ..relaxation import InputLines, Relaxation
from .base import Function, LinearOperation, UnsupportedOperation
from .registry import Tracing, from_module
from .rows import Groups, LastOnes, Rows
from .scale import Scale
from .softmax import OfRows

ROUNDING = 16
"""Lines and intervals are moved outward by this, plus the number of summands, times eps and the size of their terms."""


@dataclass(frozen=True, eq=False)
class Centering(LinearOperation):
    """Rows minus their means, computed twice, so that a constant row gives exactly 0, as fused operators do."""

    rows: Rows

    def __call__(self, x: Tensor) -> Tensor:
        rows = self.rows.split(x)
        rows = rows - rows.mean(-1, keepdim=True)
        return self.rows.join(rows - rows.mean(-1, keepdim=True), x.shape[1:])

    def interval(self, x: Interval) -> Interval:
        """Exact: each entry is (1 - 1 / K) times its own, minus the others' share."""
        radius = self.rows.split(x.radius)
        count = radius.shape[-1]
        radius = radius * (1 - 2 / count) + radius.mean(-1, keepdim=True)
        return Interval(self(x.center), self.rows.join(radius.clamp(min=0), x.center.shape[1:]))

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        rows = self.rows.split_forms(forms)
        return (self.rows.join_forms(rows - rows.mean(-1, keepdim=True), shapes[0]),)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        (x,) = inputs
        low, high = self.rows.split_forms(x.lower), self.rows.split_forms(x.upper)
        count = low.shape[-1]
        # the others' mean share has the other sign
        below = low * (1 - 1 / count) - (high.sum(-1, keepdim=True) - high) / count
        above = high * (1 - 1 / count) - (low.sum(-1, keepdim=True) - low) / count
        shape = x.lower.shape[2:]
        return InputLines(self.rows.join_forms(below, shape), self.rows.join_forms(above, shape))

    def magnitude(self, x: Tensor) -> Tensor:
        rows = self.rows.split(x)
        return self.rows.join(rows + 3 * rows.mean(-1, keepdim=True), x.shape[1:])

    def roundings(self, shape: torch.Size) -> int:
        return 2 * shape.numel() + 4

    def terms(self, shape: torch.Size) -> int:
        return shape.numel() + 1

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)


@dataclass(frozen=True)
class NormLines(Relaxation):
    """Lines own x_i + below_i (low . x) + above_i (high . x) + constant_i of each entry of a row, and those above it.

    Args:
        own, below, above, constant: (2, B, …, K), of the lower lines and of the upper ones; below >= 0 >= above in the
            lower lines, the other way round in the upper ones.
        low, high: (B, …, K), slopes of the factor's lines.
        rows: how values fall into rows.
    """

    own: tuple[Tensor, Tensor]
    below: tuple[Tensor, Tensor]
    above: tuple[Tensor, Tensor]
    constant: tuple[Tensor, Tensor]
    low: Tensor
    high: Tensor
    rows: Rows

    def map(self, function: Callable[[Tensor], Tensor]) -> NormLines:
        def both(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return function(pair[0]), function(pair[1])

        pairs = both(self.own), both(self.below), both(self.above), both(self.constant)
        return NormLines(*pairs, function(self.low), function(self.high), self.rows)

    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        split = self.rows.split_forms(forms)
        positive, negative = split.clamp(min=0), split.clamp(max=0)

        def both(pair: tuple[Tensor, Tensor]) -> Tensor:
            return positive * pair[0].unsqueeze(1) + negative * pair[1].unsqueeze(1)

        through = both(self.own)
        through = through + both(self.below).sum(-1, keepdim=True) * self.low.unsqueeze(1)
        through = through + both(self.above).sum(-1, keepdim=True) * self.high.unsqueeze(1)
        constants = constants + both(self.constant).flatten(2).sum(-1)
        return (self.rows.join_forms(through, forms.shape[2:]),), constants

    def forward(self, *inputs: InputLines) -> InputLines:
        (x,) = inputs
        low, high = self.rows.split_forms(x.lower), self.rows.split_forms(x.upper)

        def matrix(side: int) -> Tensor:
            slopes = self.below[side].unsqueeze(-1) * self.low.unsqueeze(-2)
            slopes = slopes + self.above[side].unsqueeze(-1) * self.high.unsqueeze(-2)
            return slopes + torch.diag_embed(self.own[side])

        def through(slopes: Tensor, same: Tensor, other: Tensor) -> Tensor:
            def times(lines: Tensor, part: Tensor) -> Tensor:
                return (lines.movedim(1, -2) @ part.mT).movedim(-2, 1)

            return times(same, slopes.clamp(min=0)) + times(other, slopes.clamp(max=0))

        lower, upper = through(matrix(0), low, high), through(matrix(1), high, low)
        lower[:, -1] += self.constant[0]
        upper[:, -1] += self.constant[1]
        shape = x.lower.shape[2:]
        return InputLines(self.rows.join_forms(lower, shape), self.rows.join_forms(upper, shape))


@dataclass(frozen=True, eq=False)
class RowNorm(OfRows):
    """Rows divided by the root of their mean square, or of their sum of squares, plus ``eps`` inside of the root.

    Args:
        eps: > 0.
        mean: whether squares are averaged.
    """

    eps: float
    mean: bool = True

    kind: ClassVar[str] = "a normalisation by the row's own size"

    def _weight(self, count: int) -> float:
        return 1 / count if self.mean else 1.0

    def __call__(self, x: Tensor) -> Tensor:
        rows = self.rows.split(x)
        size = (rows * rows).sum(-1, keepdim=True) * self._weight(rows.shape[-1])
        return self.rows.join(rows * (size + self.eps).rsqrt(), x.shape[1:])

    def _squares(self, x: Bounds) -> tuple[Tensor, Tensor]:
        """The smallest and the largest squares of entries."""
        first, last = x.lower * x.lower, x.upper * x.upper
        inside = (x.lower <= 0) & (x.upper >= 0)
        return torch.where(inside, 0.0, torch.minimum(first, last)), torch.maximum(first, last)

    def row_interval(self, x: Bounds) -> Interval:
        count = x.lower.shape[-1]
        weight, eps = self._weight(count), torch.finfo(x.lower.dtype).eps
        least, most = self._squares(x)
        room = ((ROUNDING + count) * eps * most.sum(-1, keepdim=True)).detach()
        few = (least.sum(-1, keepdim=True) - least - room).clamp(min=0)
        many = most.sum(-1, keepdim=True) - most + room

        def value(d: Tensor, others: Tensor) -> Tensor:
            return d * (weight * (d * d + others) + self.eps).rsqrt()

        low = value(x.lower, torch.where(x.lower >= 0, many, few))
        high = value(x.upper, torch.where(x.upper >= 0, few, many))
        error = (ROUNDING + count) * eps
        return Interval.from_bounds(low - (error * low.abs()).detach(), high + (error * high.abs()).detach())

    def row_lines(self, x: Bounds) -> NormLines:
        count = x.lower.shape[-1]
        weight, eps = self._weight(count), torch.finfo(x.lower.dtype).eps
        lower, upper = x.lower, x.upper
        middle, reach = (lower + upper) / 2, torch.maximum(lower.abs(), upper.abs())
        least, most = self._squares(x)
        spare = (ROUNDING + count) * eps
        first = (weight * least.sum(-1, keepdim=True) * (1 - spare)).clamp(min=0)
        last = weight * most.sum(-1, keepdim=True) * (1 + spare)

        def factor(q: Tensor) -> Tensor:
            return (q + self.eps).rsqrt()

        # r above: the tangent at the middle of the chords' range, of slope < 0 in q
        place = weight * ((lower * lower + upper * upper) / 2).sum(-1, keepdim=True)
        at, fall = factor(place), -factor(place) / (place + self.eps) / 2
        low = fall * weight * (lower + upper)
        low_constant = at - fall * place - fall * weight * (lower * upper).sum(-1, keepdim=True)
        size = at - fall * (place + 3 * last)
        low_constant = low_constant - (spare * size).detach()
        # r below: the chord over [first, last], as -1 / (r r' (r + r')) without cancellation
        smallest, largest = factor(last), factor(first)
        chord = -smallest * largest / (1 / smallest + 1 / largest)
        high = 2 * chord * weight * middle
        high_constant = largest - chord * first - chord * weight * (middle * middle).sum(-1, keepdim=True)
        size = largest - chord * (first + 4 * last)
        high_constant = high_constant + (spare * size).detach()
        smallest, largest = smallest * (1 - spare), largest * (1 + spare)

        def plane(below: bool, end: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            """bound d + end r - end bound, with lines for r; and its value in the middle."""
            from_below = end.clamp(min=0) if below else end.clamp(max=0)
            from_above = end - from_below
            constant = from_below * low_constant + from_above * high_constant - end * bound
            at_middle = bound * middle + constant
            at_middle = at_middle + from_below * (low * middle).sum(-1, keepdim=True)
            at_middle = at_middle + from_above * (high * middle).sum(-1, keepdim=True)
            return bound.expand_as(end), from_below, from_above, constant, at_middle

        def better(below: bool, *planes: tuple[Tensor, ...]) -> list[Tensor]:
            one, other = planes
            chosen = one[-1] >= other[-1] if below else one[-1] <= other[-1]
            return [torch.where(chosen, a, b) for a, b in zip(one[:-1], other[:-1])]

        under = better(True, plane(True, lower, smallest), plane(True, upper, largest))
        over = better(False, plane(False, lower, largest), plane(False, upper, smallest))
        # the roundings of slopes and constants, at the size of all terms
        terms = reach * (largest + low.abs().mul(reach).sum(-1, keepdim=True) + low_constant.abs()
                         + high.abs().mul(reach).sum(-1, keepdim=True) + high_constant.abs())  # fmt: skip
        room = (spare * terms).detach()
        under[3], over[3] = under[3] - room, over[3] + room
        own, from_below, from_above, constant = zip(under, over)
        return NormLines(own, from_below, from_above, constant, low, high, self.rows)


def normalise(append: Callable[[Any], int], path: str, source: int, rows: Rows, eps: float, *, centered: bool) -> int:
    """Append a normalisation to mean square 1, after the mean is taken away where ``centered``."""
    if not eps > 0:
        raise UnsupportedOperation(f"{path}: found eps={eps}; accepted: a number > 0")
    source = append(Centering(path, (source,), rows)) if centered else source
    return append(RowNorm(path, (source,), rows, eps))


@dataclass(frozen=True, eq=False)
class _Learned:
    """The weight and bias of a norm's entries, looked up at each use."""

    layer: nn.Module

    def __call__(self) -> tuple[Tensor | float, Tensor | float]:
        layer: Any = self.layer
        weight, bias = layer.weight, getattr(layer, "bias", None)
        return (1.0 if weight is None else weight), (0.0 if bias is None else bias)


@from_module(nn.LayerNorm)
def _layer_norm(tracing: Tracing, path: str, source: int, module: nn.LayerNorm) -> int:
    rows = LastOnes(len(module.normalized_shape))
    source = normalise(tracing.append, path, source, rows, module.eps, centered=True)
    return tracing.append(Scale(path, (source,), _Learned(module))) if module.elementwise_affine else source


@from_module(nn.RMSNorm)
def _rms_norm(tracing: Tracing, path: str, source: int, module: nn.RMSNorm) -> int:
    if module.eps is None:
        raise UnsupportedOperation(f"{path}: found eps=None, which depends on the dtype; accepted: a number > 0")
    source = normalise(tracing.append, path, source, LastOnes(len(module.normalized_shape)), module.eps, centered=False)
    return tracing.append(Scale(path, (source,), _Learned(module))) if module.elementwise_affine else source


@dataclass(frozen=True, eq=False)
class _OfChannels:
    """The weight and bias of each channel."""

    layer: nn.GroupNorm | nn.InstanceNorm1d | nn.InstanceNorm2d
    places: int

    def __call__(self) -> tuple[Tensor, Tensor]:
        shape = (1, -1, *[1] * self.places)
        return self.layer.weight.reshape(shape), self.layer.bias.reshape(shape)


@from_module(nn.GroupNorm)
def _group_norm(tracing: Tracing, path: str, source: int, module: nn.GroupNorm) -> int:
    places = 2 if module.affine else None
    rows = Groups(module.num_groups, places, path)
    source = normalise(tracing.append, path, source, rows, module.eps, centered=True)
    return tracing.append(Scale(path, (source,), _OfChannels(module, 2))) if module.affine else source


@from_module(nn.InstanceNorm1d, nn.InstanceNorm2d)
def _instance_norm(tracing: Tracing, path: str, source: int, module: nn.InstanceNorm1d | nn.InstanceNorm2d) -> int:
    if module.track_running_stats:
        raise UnsupportedOperation(f"{path}: found track_running_stats=True; accepted: an instance norm without")
    places = 2 if isinstance(module, nn.InstanceNorm2d) else 1
    source = normalise(tracing.append, path, source, Groups(0, places, path), module.eps, centered=True)
    return tracing.append(Scale(path, (source,), _OfChannels(module, places))) if module.affine else source
