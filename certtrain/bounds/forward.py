"""The plain pass through a program: logits, and the batch statistics that bounds are to use, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from . import program as p
from .tracing import trace


@dataclass(frozen=True)
class BatchStatistics:
    """Mean and *biased* variance per channel of one batch norm's input, each (C,), with their gradients."""

    mean: Tensor
    variance: Tensor


Statistics = Mapping[int, BatchStatistics]
"""Batch statistics by the position of their node in the program."""


@dataclass(frozen=True)
class Forward:
    """What a plain pass yields: logits (B, K), and the statistics that its batch norms used (none in eval mode)."""

    logits: Tensor
    statistics: Statistics = field(default_factory=dict)


def forward(
    model: nn.Module | p.Program, images: Tensor, statistics: Statistics | None = None, *, twice: bool = False
) -> Forward:
    """Logits of ``images`` (B, *shape) by the model's program, or what a part of one makes of its input.

    In training mode batch norms use their batch's statistics, update the running ones as torch does, and
    hand the statistics over. With ``statistics`` given they use those and update nothing. In
    evaluation mode they are folded into the layer before them: this is the network that is certified. The pass is
    differentiable once, or ``twice``, which is slower.
    """
    program = trace(model)
    last_use = program.last_use()
    values = {0: images}
    run = _Run(statistics, kernels.reference if twice else kernels)
    for position, node in enumerate(program.nodes[1:], start=1):
        inputs = [values[read] for read in node.inputs]
        values[position] = RULES[type(node)](node, position, run, *inputs)
        for read in {read for read in node.inputs if last_use[read] == position}:
            del values[read]
    return Forward(values[len(program.nodes) - 1], run.collected if statistics is None else statistics)


def coefficients(norm: p.BatchNorm, statistics: BatchStatistics | None) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C,), of a batch norm with the given statistics, or its running ones if None."""
    if statistics is None:
        if norm.running_mean is None or norm.running_var is None:
            raise p.UnsupportedNode("a batch norm without running statistics; accepted: track_running_stats=True")
        statistics = BatchStatistics(norm.running_mean, norm.running_var)
    scale = torch.rsqrt(statistics.variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -statistics.mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def check_features(node: p.Affine, x: Tensor) -> None:
    """Refuse what the layer would take for something else.

    Batch norm acts on dimension 1, a linear layer on the last one: fused only where they are the same. A convolution
    takes a tensor without batch dimension for one image.
    """
    if not isinstance(node.layer, nn.Linear) and x.ndim != node.layer.weight.ndim:
        accepted = ("(B, channels, length)", "(B, channels, height, width)")[node.layer.weight.ndim - 3]
        raise p.UnsupportedNode(
            f"{type(node.layer).__name__} at {node.path!r}: found {x.ndim} dimensions; accepted: {accepted}"
        )
    if node.norm is not None and isinstance(node.layer, nn.Linear) and x.ndim != 2:
        raise p.UnsupportedNode(
            f"BatchNorm1d after {node.path!r}: found {x.ndim} dimensions; accepted: (B, features) there"
        )


class _Run:
    """What the rules share during one pass."""

    def __init__(self, given: Statistics | None, ops: ModuleType = kernels):
        self.given, self.ops = given, ops
        self.collected: dict[int, BatchStatistics] = {}

    def norm(self, norm: p.BatchNorm, position: int, x: Tensor) -> Tensor:
        if norm.training and self.given is None:
            y, mean, variance = self.ops.batch_statistics_norm(x, norm.weight, norm.bias, norm.eps)
            self.collected[position] = BatchStatistics(mean, variance)
            _update_running(norm, mean, variance, x.numel() // x.shape[1])
            return y
        scale, shift = self.coefficients(norm, position)
        return x * _channels(scale, x) + _channels(shift, x)

    def coefficients(self, norm: p.BatchNorm, position: int) -> tuple[Tensor, Tensor]:
        return coefficients(norm, None if self.given is None else self.given.get(position))


@torch.no_grad()
def _update_running(norm: p.BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.detach(), momentum)
    norm.running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)  # torch keeps the unbiased one


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 2))


def _affine(node: p.Affine, position: int, run: _Run, x: Tensor) -> Tensor:
    check_features(node, x)
    norm = node.norm
    if norm is None or (norm.training and run.given is None):
        y = node.layer(x) if norm is None else run.norm(norm, position, node.layer(x))
    else:
        y = _folded(node.layer, *run.coefficients(norm, position))(x)
    return node.activation(y) if node.activation else y


def _folded(layer: nn.Linear | p.Convolution, scale: Tensor, shift: Tensor) -> Callable[[Tensor], Tensor]:
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    bias = shift if layer.bias is None else layer.bias * scale + shift
    if isinstance(layer, nn.Linear):
        return lambda x: F.linear(x, weight, bias)
    return lambda x: layer._conv_forward(x, weight, bias)


def _norm(node: p.Norm, position: int, run: _Run, x: Tensor) -> Tensor:
    y = run.norm(node.norm, position, x)
    return node.activation(y) if node.activation else y


RULES: dict[type[p.Node], Callable[..., Tensor]] = {
    p.Affine: _affine,
    p.Norm: _norm,
    p.Activate: lambda node, position, run, x: node.activation(x),
    p.Pool: lambda node, position, run, x: node.function(x),
    p.Reshape: lambda node, position, run, x: node.function(x),
    p.Add: lambda node, position, run, x, y: x + node.sign * y,
    p.Concat: lambda node, position, run, *parts: torch.cat(parts, node.along(parts[0].ndim)),
    p.Scale: lambda node, position, run, x: node(x),
    p.Dropout: lambda node, position, run, x: node.module(x),
    p.Whole: lambda node, position, run, x: node.module(x),
}
