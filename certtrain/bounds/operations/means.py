"""Linear maps with non-negative coefficients: means and sums over dimensions, and interpolation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..interval import Interval
from .base import Function, UnsupportedOperation
from .options import dimensions, options
from .pooling import AveragePool
from .rearrangement import Copies, Rearrangement
from .registry import Tracing, from_function, from_module


@dataclass(frozen=True, eq=False)
class Reduction(AveragePool):
    """Sums, or means, over any dimensions but the batch's.

    Args:
        count: the shape of a value → the number of entries of one sum.
    """

    count: Callable[[torch.Size], int]

    def roundings(self, shape: torch.Size) -> int:
        return self.count(shape) + 1

    def terms(self, shape: torch.Size) -> int:
        return self.count(shape) + 1

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self.function)


@dataclass(frozen=True, eq=False)
class Resampling(AveragePool):
    """Places of images or sequences (B, C, …) interpolated between neighbours; the coefficients sum to at most 1.

    Kernels compute coordinates, and from them coefficients, in float32: each is off by up to three roundings of a
    number below the image's size. Any neighbour may be the one that gets what another loses.
    """

    def interval(self, x: Interval) -> Interval:
        return Interval(self.function(x.center), self.function(x.radius))

    def magnitude(self, x: Tensor) -> Tensor:
        return self.function(x).abs() + x.flatten(2).amax(-1).reshape(*x.shape[:2], *[1] * (x.ndim - 2))

    def roundings(self, shape: torch.Size) -> int:
        return 8 * (sum(shape[1:]) + 2)

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self.function)


@from_function("mean", "sum")
def _reduced(tracing: Tracing, node: fx.Node, source: int) -> int:
    over, keepdim = dimensions(tracing, node)
    total = (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")) == "sum"

    def reduce(x: Tensor) -> Tensor:
        gone = over.of(x.ndim)
        return x.sum(gone, keepdim=keepdim) if total else x.mean(gone, keepdim=keepdim)

    return tracing.append(Reduction(node.name, (source,), reduce, over.count))


def _resized(tracing: Tracing, path: str, source: int, mode: str, settings: dict[str, Any]) -> int:
    """Append ``F.interpolate``."""
    sizes = [settings["size"], settings["scale_factor"]]
    if not all(one is None or isinstance(one, (int, float, tuple, list)) for one in sizes):
        raise UnsupportedOperation(f"interpolate at {path!r}: found sizes {sizes}; accepted: numbers")
    if mode not in _KINDS or settings.pop("antialias", False):
        found = f"mode={mode}" if mode not in _KINDS else "antialias=True"
        raise UnsupportedOperation(
            f"interpolate at {path!r}: found {found}; accepted: {', '.join(_KINDS)}, without antialias"
        )

    def resize(x: Tensor) -> Tensor:
        return F.interpolate(x, mode=mode, **settings)

    return tracing.append(_KINDS[mode](path, (source,), resize))


_KINDS: dict[str, type[Rearrangement]] = {
    "nearest": Copies, "nearest-exact": Copies, "linear": Resampling, "bilinear": Resampling,
    "area": AveragePool,
}  # fmt: skip


@from_function("interpolate", "upsample")
def _interpolate(tracing: Tracing, node: fx.Node, source: int) -> int:
    defaults = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
    more = {"recompute_scale_factor": None, "antialias": False}
    names = {**defaults, **more}
    settings = dict(zip(names, options(tracing, node, **names)))
    return _resized(tracing, node.name, source, settings.pop("mode"), settings)


@from_module(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def _upsample(tracing: Tracing, path: str, source: int, module: nn.Upsample) -> int:
    settings: dict[str, Any] = {name: getattr(module, name) for name in _SETTINGS}
    return _resized(tracing, path, source, module.mode, settings)


_SETTINGS: tuple[str, ...] = ("size", "scale_factor", "align_corners", "recompute_scale_factor")
