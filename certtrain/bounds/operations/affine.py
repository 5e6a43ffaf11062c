"""Layers with a weight and a bias, which batch norms merge into and fused kernels compute."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..interval import Interval
from ..region import Region
from ..relaxation import InputLines, Relaxation, map_lines
from ..wrappers import ComputedLayer
from .base import Folding, Graph, LinearOperation, alike
from .sum import added


class Weighted(Protocol):
    """The holder of an operation's weights, read at each use: a layer of the model, or ``Weights``."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class Weights:
    """Fixed weights of a folded network."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Affine(LinearOperation):
    """A linear map by ``layer.weight``, with outputs or their channels in dimension 0, plus ``layer.bias``."""

    layer: Weighted

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def with_weights(self, weight: Tensor, bias: Tensor | None) -> Self:
        """The operation with these fixed weights."""
        return replace(self, layer=Weights(weight, bias))

    def with_norm(self, scale: Tensor, shift: Tensor) -> Self:
        """The operation followed by ``scale * y + shift`` per output channel, both (K,), as one operation."""
        weight, bias = self.weight, self.bias  # read once: a parametrization computes, and may iterate, at each reading
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return self.with_weights(weight, shift if bias is None else bias * scale + shift)

    def fold(self, folding: Folding, *sources: int) -> int:
        bias = None if self.bias is None else folding.tensor(self.bias, self.path)
        folded = self.with_weights(folding.tensor(self.weight, self.path), bias)
        return folding.append(replace(folded, inputs=sources))

    def change(self, other: Any, graph: Graph, values: Sequence[int], changes: Sequence[int | None]) -> int | None:
        """W' d + (W' - W) x + (b' - b)."""
        if not alike(self, other, "layer") or self.weight.shape != other.weight.shape:
            return super().change(other, graph, values, changes)
        weight, none = graph.difference(self.weight, other.weight), self.weight.new_zeros(len(self.weight))
        bias = graph.difference(*(none if one.bias is None else one.bias for one in (self, other)))
        parts = [
            graph.append(replace(other.with_weights(other.weight, None), inputs=(d,))) for d in changes if d is not None
        ]
        if bool(weight.any()) or bool(bias.any()):
            parts.append(graph.append(replace(other.with_weights(weight, bias), inputs=tuple(values))))
        return added(graph, self.path, parts)

    def prepare(self) -> None:
        """Update the layer before a plain pass in training mode, as its hooks would."""
        if isinstance(self.layer, ComputedLayer):
            self.layer.iterate()

    def takes_norm(self, dimensions: int) -> bool:
        """Whether a following batch norm can be merged, for inputs with this number of dimensions."""
        return True

    def interval(self, x: Interval) -> Interval:
        return self.fused(x)

    @abstractmethod
    def fused(
        self, x: Interval, scale: Tensor | None = None, shift: Tensor | None = None, *, relu: bool = False
    ) -> Interval:
        """``interval`` of the operation, then of ``scale * y + shift`` per channel and of a ReLU, by one kernel."""

    @abstractmethod
    def over_set(self, region: Region, hull: Interval, scale: Tensor, shift: Tensor) -> Interval:
        """``interval`` of the first affine operation over a set that is not a box.

        Outputs are linear forms of the image, minimised by ``region.concretise``.

        Args:
            hull: the box of the operation's input, ``scale * images + shift``.
            scale, shift: (1, *input shape).
        """

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        (x,) = inputs
        up, down = (self.with_weights(part, None) for part in (self.weight.clamp(min=0), self.weight.clamp(max=0)))
        lower = map_lines(up, x.lower) + map_lines(down, x.upper)
        upper = map_lines(up, x.upper) + map_lines(down, x.lower)
        lines = InputLines(lower, upper)
        return lines if self.bias is None else lines.shifted(self.bias.reshape(-1, *[1] * (self.weight.ndim - 2)))


def with_weights(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A torch layer, with its parameters replaced by these."""
    layer.weight = nn.Parameter(weight)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return layer


def absolute(bias: Tensor | None) -> Tensor | None:
    """|bias|, or None."""
    return None if bias is None else bias.abs()


def concretised(region: Region, forms: Tensor, constant: Tensor) -> Interval:
    """The interval (B, R) of linear forms (B, R, *shape) over a region, plus a constant that broadcasts with it."""
    lower, upper = region.concretise(forms), -region.concretise(-forms)
    return Interval.from_bounds(lower + constant, torch.maximum(lower, upper) + constant)
