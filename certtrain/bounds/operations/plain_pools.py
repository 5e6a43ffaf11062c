"""Pools as exporters and other tools take them: plain ones, behind Pad and Gather where windows are irregular.

ONNX has no divisor_override and no adaptive pools, and its ceil_mode counts windows over padding alone, which torch
leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...typed import as_ints
from .base import Function


@dataclass(frozen=True)
class Axis:
    """The windows of a pool along one dimension of the image.

    Args:
        size: of the image. places: in each window, in increasing order.
    """

    size: int
    places: list[list[int]]

    @property
    def length(self) -> int:
        """Number of places in the largest window."""
        return max(len(window) for window in self.places)

    def tiles(self) -> bool:
        """Whether windows of one length lie side by side and fill the image."""
        joined = [place for window in self.places for place in window]
        return joined == list(range(self.size)) and len({len(window) for window in self.places}) == 1

    def regular(self, ceil: bool) -> tuple[int, int, int] | None:
        """(stride, padding, dilation) of a pool with these windows, in ONNX's ceil_mode or without; None if there is
        none."""
        count, whole = len(self.places), max(self.places, key=len)
        dilation = whole[1] - whole[0] if len(whole) > 1 else 1
        padding = dilation * (self.length - len(self.places[0])) - self.places[0][0]
        if not 0 <= padding <= self.length // 2:
            return None
        room = self.size + 2 * padding - dilation * (self.length - 1) - 1
        for stride in range(1, self.size + 2 * padding + 1):
            if (-(-room // stride) if ceil else room // stride) + 1 == count and self.places == [
                [place for place in range(start, start + dilation * self.length, dilation) if 0 <= place < self.size]
                for start in range(-padding, count * stride - padding, stride)
            ]:
                return stride, padding, dilation
        return None

    def gathered(self, filler: int | None) -> list[int]:
        """The places of all windows, one after the other; short windows are filled up with ``filler``, or with their
        own first place."""
        return [
            place
            for window in self.places
            for place in window + [window[0] if filler is None else filler] * (self.length - len(window))
        ]


class GatheredPool(nn.Module):
    """A floor-mode pool over places that are gathered window by window, times ``gain`` per window.

    Args:
        axes: the windows along each dimension. gain: (1, *output), for averages; None for maxima.
    """

    gain: Tensor

    def __init__(self, axes: Sequence[Axis], gain: Tensor | None):
        super().__init__()
        self.averages, self.kernel = gain is not None, [axis.length for axis in axes]
        for number, axis in enumerate(axes):
            places = axis.gathered(axis.size if self.averages else None)
            self.register_buffer(f"places_{number}", torch.tensor(places))
        if gain is not None:
            self.register_buffer("gain", gain)

    def forward(self, x: Tensor) -> Tensor:
        flat = len(self.kernel) == 1
        if self.averages:
            x = F.pad(x, [0, 1] * len(self.kernel))  # a row and a column of 0, which windows are filled up with
        for number in range(len(self.kernel)):
            x = x.index_select(2 + number, self.get_buffer(f"places_{number}"))
        if not self.averages:
            pool: Any = F.max_pool1d if flat else F.max_pool2d
            return pool(x, self.kernel, self.kernel)
        pool = F.avg_pool1d if flat else F.avg_pool2d
        return pool(x, self.kernel, self.kernel) * self.gain


def plain_pool(function: Callable[[Tensor], Tensor], shape: torch.Size, *, averages: bool) -> nn.Module:
    """A module of plain operators that computes what ``function`` does.

    Args:
        function: a pool of (B, C, …) that treats all channels alike and is a product over the dimensions of the image.
        shape: of its input, (C, length) or (C, height, width).
    """
    sizes = shape[1:]
    axes = [_windows(function, sizes, axis, averages) for axis in range(len(sizes))]
    if not all(all(axis.places) for axis in axes):
        return Function(function)
    ones = function(torch.ones(1, 1, *sizes))  # the sum of each window's coefficients; 1 for maxima
    if all(axis.tiles() for axis in axes) and bool((ones == 1).all()):
        return Function(function)
    kernel, flat = [axis.length for axis in axes], len(axes) == 1
    for ceil in (False, True):
        walks = [walk for axis in axes if (walk := axis.regular(ceil)) is not None]
        if len(walks) < len(axes):
            continue
        stride, padding, dilation = ([walk[place] for walk in walks] for place in range(3))
        if not averages:
            kind: Any = nn.MaxPool1d if flat else nn.MaxPool2d
            return kind(kernel, stride, padding, dilation, ceil_mode=ceil)
        for counted in (True, False) if set(dilation) == {1} else ():
            kind = nn.AvgPool1d if flat else nn.AvgPool2d
            pool = kind(kernel, stride, padding, ceil_mode=ceil, count_include_pad=counted)
            if torch.equal(pool(torch.ones(1, 1, *sizes)), ones):
                return pool
    if not averages:
        return GatheredPool(axes, None)
    ungained = GatheredPool(axes, torch.ones(1, *ones.shape[1:]))
    return GatheredPool(axes, ones / ungained(torch.ones(1, 1, *sizes)))


def _windows(function: Callable[[Tensor], Tensor], sizes: torch.Size, axis: int, averages: bool) -> Axis:
    """The windows along one dimension, found by an image for each place that is 1 there and, elsewhere, 0 or -1."""
    size = sizes[axis]
    images = torch.eye(size) if averages else 2 * torch.eye(size) - 1
    images = images.reshape(size, 1, *(size if place == axis else 1 for place in range(len(sizes))))
    found = function(images.expand(size, 1, *sizes).contiguous())
    seen = (found.movedim(2 + axis, 1).flatten(2) != 0) if averages else (found.movedim(2 + axis, 1).flatten(2) > 0)
    return Axis(size, [as_ints(column.nonzero()) for column in seen.any(-1).T])
