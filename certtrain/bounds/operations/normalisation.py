"""Normalisations by statistics of one's own: layer, group, instance and RMS norms, and Euclidean norms.

A row is centered first, if its mean is taken away, and then divided by its size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from .base import UnsupportedOperation
from .centering import Centering
from .options import options, refuse
from .registry import Tracing, from_function, from_module
from .row_norm import SMALLEST, RowNorm
from .rows import Along, Groups, LastOnes, Rows
from .scale import Scale


def normalise(append: Callable[[Any], int], path: str, source: int, rows: Rows, eps: float, *, centered: bool) -> int:
    """Append a normalisation to mean square 1, after the mean is taken away where ``centered``."""
    if not eps > 0:
        raise UnsupportedOperation(f"{path}: found eps={eps}; accepted: a number > 0")
    source = append(Centering(path, (source,), rows)) if centered else source
    return append(RowNorm(path, (source,), rows, eps))


@dataclass(frozen=True, eq=False)
class Learned:
    """The weight and bias of a norm's entries, looked up at each use."""

    layer: Any

    def __call__(self) -> tuple[Tensor | float, Tensor | float]:
        weight, bias = self.layer.weight, getattr(self.layer, "bias", None)
        return (1.0 if weight is None else weight), (0.0 if bias is None else bias)


@from_module(nn.LayerNorm)
def _layer_norm(tracing: Tracing, path: str, source: int, module: nn.LayerNorm) -> int:
    rows = LastOnes(len(module.normalized_shape))
    source = normalise(tracing.append, path, source, rows, module.eps, centered=True)
    return tracing.append(Scale(path, (source,), Learned(module))) if module.elementwise_affine else source


@from_module(nn.RMSNorm)
def _rms_norm(tracing: Tracing, path: str, source: int, module: nn.RMSNorm) -> int:
    if module.eps is None:
        raise UnsupportedOperation(f"{path}: found eps=None, which depends on the dtype; accepted: a number > 0")
    source = normalise(tracing.append, path, source, LastOnes(len(module.normalized_shape)), module.eps, centered=False)
    return tracing.append(Scale(path, (source,), Learned(module))) if module.elementwise_affine else source


@dataclass(frozen=True, eq=False)
class OfChannels:
    """The weight and bias of each channel."""

    layer: Any
    places: int

    def __call__(self) -> tuple[Tensor | float, Tensor | float]:
        shape, (weight, bias) = (1, -1, *[1] * self.places), (self.layer.weight, self.layer.bias)
        return (1.0 if weight is None else weight.reshape(shape)), (0.0 if bias is None else bias.reshape(shape))


@from_module(nn.GroupNorm)
def _group_norm(tracing: Tracing, path: str, source: int, module: nn.GroupNorm) -> int:
    places = 2 if module.affine else None
    rows = Groups(module.num_groups, places, path)
    source = normalise(tracing.append, path, source, rows, module.eps, centered=True)
    return tracing.append(Scale(path, (source,), OfChannels(module, 2))) if module.affine else source


@from_module(nn.InstanceNorm1d, nn.InstanceNorm2d)
def _instance_norm(tracing: Tracing, path: str, source: int, module: nn.InstanceNorm1d | nn.InstanceNorm2d) -> int:
    if module.track_running_stats:
        raise UnsupportedOperation(f"{path}: found track_running_stats=True; accepted: an instance norm without")
    places = 2 if isinstance(module, nn.InstanceNorm2d) else 1
    source = normalise(tracing.append, path, source, Groups(0, places, path), module.eps, centered=True)
    return tracing.append(Scale(path, (source,), OfChannels(module, places))) if module.affine else source


@from_function("normalize")
def _normalized(tracing: Tracing, node: fx.Node, source: int) -> int:
    power, dim, eps, _ = options(tracing, node, p=2.0, dim=1, eps=1e-12, out=None)
    if power != 2 or not isinstance(dim, int):
        refuse(node, f"p={power}, dim={dim}", "p=2, one dim")
    if not eps >= SMALLEST:
        refuse(node, f"eps={eps}", f"a number >= {SMALLEST:g}")
    return tracing.append(RowNorm(node.name, (source,), Along(dim, node.name), 0.0, mean=False, floor=float(eps)))
