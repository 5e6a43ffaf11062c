"""Transposed convolutions in one and two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..interval import Interval
from ..relaxation import InputLines, Relaxation
from .affine import Weighted, Weights, absolute, with_weights
from .base import Folding, LinearOperation, UnsupportedOperation
from .convolution import Sizes
from .registry import Tracing, from_module


@dataclass(frozen=True, eq=False)
class TransposedConvolution(LinearOperation):
    """The adjoint of a zero-padded convolution, of weight (C, K / groups, h, w) or (C, K / groups, length), plus bias
    (K,)."""

    layer: Weighted
    stride: Sizes
    padding: Sizes
    output_padding: Sizes
    groups: int
    dilation: Sizes

    @property
    def geometry(self) -> tuple[Sizes, Sizes, Sizes, int, Sizes]:
        """(stride, padding, output_padding, groups, dilation), as torch's functions take them."""
        return self.stride, self.padding, self.output_padding, self.groups, self.dilation

    def __call__(self, x: Tensor) -> Tensor:
        return self._spread(x, self.layer.weight, self.layer.bias)

    def _spread(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.ndim != weight.ndim:  # torch would take an input without batch dimension for one image
            raise UnsupportedOperation(
                f"transposed convolution at {self.path!r}: found {x.ndim} dimensions; accepted: {weight.ndim}"
            )
        function = F.conv_transpose1d if weight.ndim == 3 else F.conv_transpose2d
        return function(x, weight, bias, *self.geometry)

    def interval(self, x: Interval) -> Interval:
        return Interval(self(x.center), self._spread(x.radius, self.layer.weight.abs(), None))

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        function: Any = F.conv1d if self.layer.weight.ndim == 3 else F.conv2d
        back = function(
            forms.flatten(0, 1), self.layer.weight, None, self.stride, self.padding, self.dilation, self.groups
        )
        (shape,) = shapes  # with output padding the convolution may give places beyond the input's, which are dropped
        for dim, size in enumerate(shape[1:], start=2):
            back = back.narrow(dim, 0, size)
        return (back.reshape(*forms.shape[:2], *shape),)

    def constant(self, forms: Tensor) -> Tensor | float:
        return 0.0 if self.layer.bias is None else forms.flatten(3).sum(-1) @ self.layer.bias

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        weight, bias = self.layer.weight, self.layer.bias
        lines = inputs[0].combine(
            lambda x: self._spread(x, weight.clamp(min=0), None), lambda x: self._spread(x, weight.clamp(max=0), None)
        )
        return lines if bias is None else lines.shifted(bias.reshape(-1, *[1] * (weight.ndim - 2)))

    def magnitude(self, x: Tensor) -> Tensor:
        return self._spread(x, self.layer.weight.abs(), absolute(self.layer.bias))

    def roundings(self, shape: torch.Size) -> int:
        return self.layer.weight[:, 0].numel() // self.groups + 1

    def terms(self, shape: torch.Size) -> int:
        weight = self.layer.weight
        return max(weight[0].numel(), weight[:, 0].numel() // self.groups) + 1

    def work(self, numbers: int) -> int:
        return numbers * self.layer.weight[0].numel()

    def module(self, shape: torch.Size) -> nn.Module:
        weight = self.layer.weight
        inputs, outputs, *kernel = weight.shape
        kind: Any = nn.ConvTranspose1d if len(kernel) == 1 else nn.ConvTranspose2d
        stride, padding, output_padding, groups, dilation = self.geometry
        layer = kind(inputs, outputs * groups, tuple(kernel), stride, padding, output_padding, groups,
                     dilation=dilation, device="meta")  # fmt: skip
        return with_weights(layer, weight, self.layer.bias)

    def fold(self, folding: Folding, *sources: int) -> int:
        bias = None if self.layer.bias is None else folding.tensor(self.layer.bias, self.path)
        weights = Weights(folding.tensor(self.layer.weight, self.path), bias)
        return folding.append(replace(self, layer=weights, inputs=sources))


@from_module(nn.ConvTranspose1d, nn.ConvTranspose2d)
def _transposed(tracing: Tracing, path: str, source: int, module: nn.ConvTranspose1d | nn.ConvTranspose2d) -> int:
    given: Any = module
    geometry = (tuple(given.stride), tuple(given.padding), tuple(given.output_padding), given.groups,
                tuple(given.dilation))  # fmt: skip
    return tracing.append(TransposedConvolution(path, (source,), module, *geometry))
