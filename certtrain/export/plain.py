"""The folded network, the one that is certified, as a module of plain layers: what the exporter is given.

Verifiers read a convolution where an elementwise normalisation stops them: alpha-beta-CROWN crashes on Sub/Div in front
of convolutions as soon as an image needs branch and bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds.folded import (
    Concat,
    Convolution,
    Dense,
    Diagonal,
    Folded,
    Nonlinear,
    Opaque,
    Operation,
    Rearrangement,
    Sum,
)


class PlainNetwork(nn.Module):
    """A folded network's operations as layers with the same weights, bit for bit."""

    def __init__(self, network: Folded):
        super().__init__()
        self.inputs = [operation.inputs for operation in network.operations[1:]]
        self.layers = nn.ModuleList(
            RULES[type(operation)](operation, network.shapes[operation.inputs[0]])
            for operation in network.operations[1:]
        )
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        values = [images]
        for layer, inputs in zip(self.layers, self.inputs, strict=True):
            values.append(layer(*(values[read] for read in inputs)))
        return values[-1]


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class _Elementwise(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.scales, self.shifts = bool((scale != 1).any()), bool(shift.any())

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale if self.scales else x
        return x + self.shift if self.shifts else x


def _with_weights(layer: nn.Linear | nn.Conv1d | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
    return layer


def _dense(operation: Dense, shape: torch.Size) -> nn.Module:
    outputs, inputs = operation.weight.shape
    return _with_weights(nn.Linear(inputs, outputs, device="meta"), operation.weight, operation.bias)


def _convolution(operation: Convolution, shape: torch.Size) -> nn.Module:
    outputs, inputs, *kernel = operation.weight.shape
    kind: Any = nn.Conv1d if len(kernel) == 1 else nn.Conv2d
    layer = kind(inputs * operation.groups, outputs, tuple(kernel), *operation.geometry, device="meta")
    return _with_weights(layer, operation.weight, operation.bias)


def _diagonal(operation: Diagonal, shape: torch.Size) -> nn.Module:
    """A 1×1 convolution where each channel has its own two numbers: its zeros add nothing, not even a rounding. A
    linear layer where a single feature has: of a binary score it makes two logits."""
    vectors = [v.reshape(-1) for v in (operation.scale, operation.shift)]
    if shape == (1,) and max(v.ndim for v in (operation.scale, operation.shift)) == 1:
        scale, shift = torch.broadcast_tensors(*vectors)
        layer = nn.Linear(1, len(scale), device="meta")
        return _with_weights(layer, scale.reshape(-1, 1).clone(), shift.clone())
    places = [v.shape[-2:].numel() if v.ndim >= 2 else v.numel() for v in (operation.scale, operation.shift)]
    if len(shape) != 3 or places != [1, 1]:
        return _Elementwise(operation.scale, operation.shift)
    inputs, outputs = shape[0], max(shape[0], *map(len, vectors))  # numbers for RGB make three of one grey channel
    scale, shift = (v.expand(outputs) for v in vectors)
    weight = torch.diag(scale) if inputs == outputs else scale
    layer = nn.Conv2d(inputs, outputs, 1, device="meta")
    return _with_weights(layer, weight.reshape(outputs, inputs, 1, 1), shift.clone() if shift.any() else None)


def _sum(operation: Sum, shape: torch.Size) -> nn.Module:
    return _Function(torch.add if operation.sign > 0 else torch.sub)


def _nonlinear(operation: Nonlinear, shape: torch.Size) -> nn.Module:
    activation = operation.activation
    if activation.kind == "leaky_relu":
        return nn.LeakyReLU(activation.slope)
    if activation.kind == "gelu_tanh":
        return nn.GELU("tanh")
    kinds = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}
    return kinds[activation.kind]()


def _concat(operation: Concat, shape: torch.Size) -> nn.Module:
    return _Function(lambda *parts: torch.cat(parts, operation.dim))


RULES: dict[type[Operation], Callable[..., nn.Module]] = {
    Dense: _dense,
    Convolution: _convolution,
    Diagonal: _diagonal,
    Rearrangement: lambda operation, shape: _Function(operation.function),
    Opaque: lambda operation, shape: _Function(operation.function),
    Sum: _sum,
    Concat: _concat,
    Nonlinear: _nonlinear,
}
