"""Layers of a weight and a bias: what batch norms fold into and the fused kernels compute."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ..interval import Interval
from ..relaxation import InputLines, Relaxation, each
from ..wrappers import ComputedLayer
from .base import Linear

if TYPE_CHECKING:
    from typing import Self

    from ..folding import Folding
    from ..region import Region


class Weighted(Protocol):
    """Where an operation's weights are looked up each time: a layer of the model, or ``Weights``."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class Weights:
    """Fixed ones, of a folded network."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Affine(Linear):
    """``layer.weight``, of which dimension 0 counts the outputs or their channels, and ``layer.bias``."""

    layer: Weighted

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def with_weights(self, weight: Tensor, bias: Tensor | None) -> Self:
        """The same operation with these instead, which stay as they are."""
        return replace(self, layer=Weights(weight, bias))

    def with_norm(self, scale: Tensor, shift: Tensor) -> Self:
        """The operation, and then ``scale * y + shift`` of each channel y, both (K,), as one."""
        weight, bias = self.weight, self.bias  # read once: a parametrization computes, and may iterate, at each reading
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return self.with_weights(weight, shift if bias is None else bias * scale + shift)

    def fold(self, folding: Folding, *sources: int) -> int:
        bias = None if self.bias is None else folding.tensor(self.bias, self.path)
        found = self.with_weights(folding.tensor(self.weight, self.path), bias)
        return folding.append(replace(found, inputs=sources))

    def prepare(self) -> None:
        """What a layer does before a plain pass in training mode."""
        if isinstance(self.layer, ComputedLayer):
            self.layer.iterate()

    def takes_norm(self, dimensions: int) -> bool:
        """Whether a batch norm's channels are this operation's outputs, for inputs of so many dimensions."""
        return True

    def interval(self, x: Interval) -> Interval:
        return self.fused(x)

    @abstractmethod
    def fused(
        self, x: Interval, scale: Tensor | None = None, shift: Tensor | None = None, *, relu: bool = False
    ) -> Interval:
        """``interval`` of the operation, of ``scale * y + shift`` of its channels, and of a ReLU, by one kernel."""

    @abstractmethod
    def over_set(self, region: Region, hull: Interval, scale: Tensor, shift: Tensor) -> Interval:
        """``interval`` of the first affine operation over a set that is not a box: each output is a linear form, which
        the set concretises.

        Args:
            hull: the box that enters the operation, around ``scale * images + shift``, each (1, *its shape).
        """

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        (x,) = inputs
        up, down = (self.with_weights(part, None) for part in (self.weight.clamp(min=0), self.weight.clamp(max=0)))
        lower, upper = each(up, x.lower) + each(down, x.upper), each(up, x.upper) + each(down, x.lower)
        found = InputLines(lower, upper)
        return found if self.bias is None else found.shifted(self.bias.reshape(-1, *[1] * (self.weight.ndim - 2)))


def with_weights(layer: nn.Linear | nn.Conv1d | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer of torch, with these weights and this bias in it."""
    layer.weight = nn.Parameter(weight)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return layer


def absolute(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.abs()


def concretised(region: Region, forms: Tensor, constant: Tensor) -> Interval:
    """The interval of linear forms (B, R, *shape) of a region's images, plus a constant that broadcasts with (B, R)."""
    lower, upper = region.concretise(forms), -region.concretise(-forms)
    return Interval.from_bounds(lower + constant, torch.maximum(lower, upper) + constant)
