"""Softmax and its logarithm, and log-sum-exp, enclosed by lines of whole rows.

With S_i = sum_j exp(x_j - x_i), softmax is 1 / S_i and its logarithm -log S_i. S_i is convex; chords of its summands
are a linear function above it, tangents one below. So 1 / S_i lies above a tangent of 1 / u at the chords' sum, and
below the chord of 1 / u at the tangents' sum; or else above a tangent of exp(x_i) / sum_j (chord of exp at x_j), which
is convex, and below the chord of exp at the tangent plane of the concave -log S_i (ER and LSE bounds, arXiv
2303.01713). Of these two lines on each side an entry takes the one that is nearer in the middle of the box.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..interval import Bounds, Interval
from ..relaxation import Relaxation
from .base import Function, Nonlinear, UnsupportedOperation
from .options import Dimensions, dimensions, options, refuse
from .rearrangement import Rearrangement, Selection
from .registry import Tracing, from_function, from_module
from .rows import Along, LastOnes, RowLines, Rows
from .scale import Scale

ROUNDING = 8
"""Lines are moved outward by this, plus the number of summands, times eps and the size of their terms."""
LARGEST = 40.0
"""Differences beyond which exp is cut off: lines there are constants, which hold as exp(-40) is below 5e-18."""


@dataclass(frozen=True, eq=False)
class OfRows(Nonlinear):
    """A function of each row, of the row's size."""

    rows: Rows

    @property
    def piecewise_linear(self) -> bool:
        return False

    def magnitude(self, x: Tensor) -> Tensor:
        return x

    def roundings(self, shape: torch.Size) -> int:
        return shape.numel() + 4

    def terms(self, shape: torch.Size) -> int:
        return shape.numel() + 1

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)

    def interval(self, x: Interval) -> Interval:
        """The exact range over a box, with room for the kernels' roundings."""
        return self.rows.interval(self.row_interval(self.rows.bounds(x)), x.center.shape[1:])

    @abstractmethod
    def row_interval(self, x: Bounds) -> Interval:
        """The range over boxes of rows (B, …, K)."""

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> Relaxation:
        """Lines of whole rows; they have no free parameters."""
        (x,) = bounds
        return self.row_lines(self.rows.bounds(x))

    @abstractmethod
    def row_lines(self, x: Bounds) -> Relaxation:
        """Lines over boxes of rows (B, …, K)."""


def _spare(size: Tensor, count: int) -> Tensor:
    return ((ROUNDING + count) * torch.finfo(size.dtype).eps * size).detach()


@dataclass(frozen=True)
class _Differences:
    """Bounds of x_j - x_i, (B, …, K, K) with i first, 0 for i = j; and where lines over them are kept finite."""

    lower: Tensor
    upper: Tensor

    @classmethod
    def of(cls, x: Bounds) -> _Differences:
        own = torch.eye(x.lower.shape[-1], dtype=torch.bool, device=x.lower.device)
        lower, upper = x.lower.unsqueeze(-2) - x.upper.unsqueeze(-1), x.upper.unsqueeze(-2) - x.lower.unsqueeze(-1)
        return cls(torch.where(own, 0.0, lower), torch.where(own, 0.0, upper))

    def cut(self) -> _Differences:
        """Those of exponentials that neither overflow nor all vanish."""
        return _Differences(self.lower.clamp(-LARGEST, LARGEST), self.upper.clamp(-LARGEST, LARGEST))

    @property
    def tame(self) -> Tensor:
        """(B, …, K) bool: whether all of an entry's differences are small enough for lines."""
        return ((self.lower >= -LARGEST) & (self.upper <= LARGEST)).all(-1)


def _reach(x: Bounds, between: _Differences) -> Tensor:
    """(B, …, K, K): the size of the numbers x_i and x_j - x_i in lines."""
    own = torch.maximum(x.lower.abs(), x.upper.abs()).unsqueeze(-1)
    return torch.maximum(between.lower.abs(), between.upper.abs()) + own


def _chord(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, constant) of a line above exp on [lower, upper]."""
    first, last, width = lower.exp(), upper.exp(), upper - lower
    wide = width > 1e-3  # the quotient of differences loses digits below that: the middle's slope is as good
    slope = torch.where(wide, (last - first) / torch.where(wide, width, 1.0), ((lower + upper) / 2).exp())
    above = torch.maximum(first - slope * lower, last - slope * upper)
    return slope, above + _spare(last * (1 + torch.maximum(lower.abs(), upper.abs())), 0)


def _tangent(place: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, constant) of a line below exp; ``reach``: the largest |number| it is used at."""
    slope = place.exp()
    return slope, slope * (1 - place) - _spare(slope * (1 + reach), 0)


def _as_rows(slopes: Tensor) -> Tensor:
    """Slopes (…, K, K) in differences x_j - x_i as slopes in x: those of x_i are minus the sum of the others."""
    off = slopes - torch.diag_embed(slopes.diagonal(dim1=-2, dim2=-1))
    return off - torch.diag_embed(off.sum(-1))


def _quotient(x: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """(slopes (B, …, K, K), constants, values in the middle) of tangents of exp(x_i) / sum_j (chord of exp at x_j). A
    value of 0: no line, because exponentials would have to be cut off."""
    top, count = x.upper.detach().amax(-1, keepdim=True), x.lower.shape[-1]
    tame = (x.lower - top >= -LARGEST).all(-1, keepdim=True)
    first, last = (x.lower - top).clamp(-LARGEST, LARGEST), (x.upper - top).clamp(-LARGEST, LARGEST)
    reach = torch.maximum(first.abs(), last.abs()) + torch.maximum(x.lower.abs(), x.upper.abs())
    slope, constant = _chord(first, last)
    middle = (first + last) / 2
    inverse = 1 / (slope * middle + constant).sum(-1, keepdim=True)
    value = middle.exp() * inverse
    size = 1 + inverse * (slope * reach + constant.abs()).sum(-1, keepdim=True)
    shared = slope * inverse
    slopes = torch.diag_embed(value) - value.unsqueeze(-1) * shared.unsqueeze(-2)
    below = value * (1 - middle - top + (shared * (middle + top)).sum(-1, keepdim=True))
    return slopes, below - _spare(value * (size + reach), count), torch.where(tame, value, 0.0)


@dataclass(frozen=True, eq=False)
class Softmax(OfRows):
    """exp(x_i) / sum_j exp(x_j) within each row."""

    kind: ClassVar[str] = "softmax"

    def __call__(self, x: Tensor) -> Tensor:
        return self.rows.join(torch.softmax(self.rows.split(x), -1), x.shape[1:])

    def row_interval(self, x: Bounds) -> Interval:
        between = _Differences.of(x)
        low, high = (-torch.logsumexp(end, -1) for end in (between.upper, between.lower))
        error = 1 + _spare(1 + torch.maximum(x.lower.abs(), x.upper.abs()).amax(-1, keepdim=True), x.lower.shape[-1])
        room = torch.finfo(low.dtype).tiny
        return Interval.from_bounds(low.exp() / error - room, (high.exp() * error).clamp(max=1 + 1e-5) + room)

    def row_lines(self, x: Bounds) -> RowLines:
        between = _Differences.of(x)
        tame, cut, count = between.tame, between.cut(), x.lower.shape[-1]
        least, most = cut.lower.exp().sum(-1), cut.upper.exp().sum(-1)
        reach = _reach(x, cut)
        # below: the tangent of 1 / u in the middle of the chords' range
        slope, constant = _chord(cut.lower, cut.upper)
        place = (least + most) / 2
        inverse = 1 / place
        lower = _as_rows(slope * -(inverse * inverse).unsqueeze(-1))
        off = ~torch.eye(count, dtype=torch.bool, device=slope.device)
        total = (constant * off).sum(-1) + 1  # of exp(0) for i = j
        below = inverse * (2 - total * inverse)
        size = inverse * (2 + inverse * (slope * reach + constant.abs()).sum(-1))
        below = below - _spare(size, count)
        other = _quotient(x)
        better = other[2] > inverse
        lower, below = torch.where(better.unsqueeze(-1), other[0], lower), torch.where(better, other[1], below)
        # above: 1 / u <= 1 / least + 1 / most - u / (least most), and u is above its tangents in the middle
        middle = (cut.lower + cut.upper) / 2
        slope, constant = _tangent(middle, reach)
        total = (constant * off).sum(-1) + 1
        product = 1 / least / most
        upper = _as_rows(slope * -product.unsqueeze(-1))
        above = 1 / least + 1 / most - product * total
        size = 1 / least + 1 / most + product * (slope * reach + constant.abs()).sum(-1)
        above = above + _spare(size, count)
        # or else: exp of the tangent plane of -log u
        share = slope / middle.exp().sum(-1, keepdim=True)
        plane, at_middle = _as_rows(-share), -torch.logsumexp(middle, -1)
        radius = ((cut.upper - cut.lower) / 2 * share).sum(-1)
        # the chord may end at the largest -log u, beyond which it is above all values
        highest = -torch.logsumexp(cut.lower, -1)
        highest = highest + _spare(1 + highest.abs() + cut.lower.abs().amax(-1), count)
        ends = at_middle - radius, torch.minimum(at_middle + radius, highest)
        rise, start = _chord(*ends)
        shift = at_middle + (share * middle).sum(-1)
        other = rise.unsqueeze(-1) * plane, rise * shift + start + _spare(rise * (1 + (share * reach).sum(-1)), count)
        in_middle = middle.exp().sum(-1)
        better = rise * at_middle + start < 1 / least + 1 / most - product * in_middle
        upper, above = torch.where(better.unsqueeze(-1), other[0], upper), torch.where(better, other[1], above)
        # constants where exponentials would overflow
        box = self.row_interval(x)
        lower, upper = (torch.where(tame.unsqueeze(-1), slopes, 0.0) for slopes in (lower, upper))
        return RowLines(
            lower, upper, torch.where(tame, below, box.lower), torch.where(tame, above, box.upper), self.rows, 1.0
        )


@dataclass(frozen=True, eq=False)
class LogSoftmax(OfRows):
    """x_i - log(sum_j exp(x_j)) within each row."""

    kind: ClassVar[str] = "log_softmax"

    def __call__(self, x: Tensor) -> Tensor:
        return self.rows.join(torch.log_softmax(self.rows.split(x), -1), x.shape[1:])

    def row_interval(self, x: Bounds) -> Interval:
        between = _Differences.of(x)
        low, high = (-torch.logsumexp(end, -1) for end in (between.upper, between.lower))
        size = 1 + torch.maximum(x.lower.abs(), x.upper.abs()).amax(-1, keepdim=True)
        error = _spare(size, x.lower.shape[-1])
        return Interval.from_bounds(low - error, high + error)

    def row_lines(self, x: Bounds) -> RowLines:
        between = _Differences.of(x)
        tame, cut, count = between.tame, between.cut(), x.lower.shape[-1]
        reach = _reach(x, cut)
        # above: the tangent plane
        middle = (cut.lower + cut.upper) / 2
        share, at_middle = torch.softmax(middle, -1), -torch.logsumexp(middle, -1)
        size = 1 + at_middle.abs() + (share * reach).sum(-1)
        upper, above = _as_rows(-share), at_middle + (share * middle).sum(-1) + _spare(size, count)
        # below: the tangent of -log u in the middle of the chords' range
        least, most = cut.lower.exp().sum(-1), cut.upper.exp().sum(-1)
        slope, constant = _chord(cut.lower, cut.upper)
        place = (least + most) / 2
        off = ~torch.eye(count, dtype=torch.bool, device=slope.device)
        total = (constant * off).sum(-1) + 1
        lower, below = _as_rows(-slope / place.unsqueeze(-1)), 1 - place.log() - total / place
        size = 2 + place.log().abs() + (slope * reach + constant.abs()).sum(-1) / place
        below = below - _spare(size, count)
        box = self.row_interval(x)
        lower, upper = (torch.where(tame.unsqueeze(-1), slopes, 0.0) for slopes in (lower, upper))
        return RowLines(
            lower, upper, torch.where(tame, below, box.lower), torch.where(tame, above, box.upper), self.rows
        )


@dataclass(frozen=True, eq=False)
class LogSumExp(OfRows):
    """log(sum_j exp(x_j)) of each row, a row of one number."""

    kind: ClassVar[str] = "logsumexp"

    def __call__(self, x: Tensor) -> Tensor:
        return self.rows.join(torch.logsumexp(self.rows.split(x), -1, keepdim=True), x.shape[1:])

    def magnitude(self, x: Tensor) -> Tensor:
        """The row's largest number, plus what as many equal ones add."""
        rows = self.rows.split(x)
        return self.rows.join(rows.amax(-1, keepdim=True) + math.log(rows.shape[-1]), x.shape[1:])

    def row_interval(self, x: Bounds) -> Interval:
        low, high = (torch.logsumexp(end, -1, keepdim=True) for end in (x.lower, x.upper))
        error = [_spare(1 + end.abs(), x.lower.shape[-1]) for end in (low, high)]
        return Interval.from_bounds(low - error[0], high + error[1])

    def row_lines(self, x: Bounds) -> RowLines:
        top, count = x.upper.detach().amax(-1, keepdim=True), x.lower.shape[-1]
        first, last = x.lower - top, x.upper - top
        tame = ((first >= -LARGEST) & (last <= LARGEST)).all(-1, keepdim=True)
        first, last = first.clamp(-LARGEST, LARGEST), last.clamp(-LARGEST, LARGEST)
        reach = torch.maximum(first.abs(), last.abs()) + torch.maximum(x.lower.abs(), x.upper.abs())
        # below: the tangent plane in the middle
        middle = (first + last) / 2
        share, at_middle = torch.softmax(middle, -1), torch.logsumexp(middle, -1, keepdim=True)
        spare = _spare(1 + top.abs() + at_middle.abs() + (share * reach).sum(-1, keepdim=True), count)
        below = at_middle - (share * (middle + top)).sum(-1, keepdim=True) + top - spare
        # above: the tangent of log u in the middle of the chords' range
        slope, constant = _chord(first, last)
        place = ((first.exp() + last.exp()).sum(-1, keepdim=True)) / 2
        slope, total = slope / place, constant.sum(-1, keepdim=True) / place
        size = 2 + place.log().abs() + top.abs() + (slope * reach + constant.abs() / place).sum(-1, keepdim=True)
        above = place.log() - 1 + total + top - (slope * top).sum(-1, keepdim=True) + _spare(size, count)
        box = self.row_interval(x)
        lower, upper = (torch.where(tame, slopes, 0.0).unsqueeze(-2) for slopes in (share, slope))
        return RowLines(
            lower, upper, torch.where(tame, below, box.lower), torch.where(tame, above, box.upper), self.rows
        )


def _stacked(tracing: Tracing, node: fx.Node, source: int, kind: type[OfRows]) -> int:
    dim, dtype, _ = options(tracing, node, dim=None, dtype=None, _stacklevel=3)
    if dtype is not None or type(dim) is not int:
        refuse(node, f"dim={dim}, dtype={dtype}", "a dimension behind the batch's, and no dtype")
    return tracing.append(kind(node.name, (source,), Along(dim, f"{kind.kind} at {node.name!r}")))


@from_function("softmax")
def _softmax(tracing: Tracing, node: fx.Node, source: int) -> int:
    return _stacked(tracing, node, source, Softmax)


@from_function("softmin")
def _softmin(tracing: Tracing, node: fx.Node, source: int) -> int:
    return _stacked(tracing, node, tracing.append(Scale(node.name, (source,), lambda: (-1.0, 0.0))), Softmax)


@from_function("log_softmax")
def _log_softmax(tracing: Tracing, node: fx.Node, source: int) -> int:
    return _stacked(tracing, node, source, LogSoftmax)


@from_function("logsumexp")
def _log_sum_exp(tracing: Tracing, node: fx.Node, source: int) -> int:
    over, keepdim = dimensions(tracing, node)
    source = log_sum_exp(tracing.append, node.name, source, over)
    return source if keepdim else tracing.append(Rearrangement(node.name, (source,), over.squeezed))


def log_sum_exp(append: Callable[[Any], int], path: str, source: int, over: Dimensions) -> int:
    """Append log-sum-exp over dimensions, which are kept with size 1; returns its position."""
    source = append(Selection(path, (source,), over.last))
    source = append(LogSumExp(path, (source,), LastOnes(1)))
    return append(Rearrangement(path, (source,), over.back))


@from_module(nn.Softmax)
def _softmax_module(tracing: Tracing, path: str, source: int, module: nn.Softmax) -> int:
    return tracing.append(Softmax(path, (source,), _along(path, module.dim)))


@from_module(nn.LogSoftmax)
def _log_softmax_module(tracing: Tracing, path: str, source: int, module: nn.LogSoftmax) -> int:
    return tracing.append(LogSoftmax(path, (source,), _along(path, module.dim)))


def _along(path: str, dim: int | None) -> Along:
    if dim is None:
        raise UnsupportedOperation(f"{path}: found dim=None; accepted: a dimension behind the batch")
    return Along(dim, path)
