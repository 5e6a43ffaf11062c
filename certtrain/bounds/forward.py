"""The plain forward pass of a network: logits, and the batch statistics for bounds, with gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from .. import kernels
from .network import Network, Statistics
from .operations import Affine, BatchNorm, BatchStatistics
from .tracing import trace


@dataclass(frozen=True)
class Forward:
    """Result of a plain pass: logits (B, K), and the statistics its batch norms used (none in evaluation mode)."""

    logits: Tensor
    statistics: Statistics = field(default_factory=dict[int, BatchStatistics])


def forward(
    model: nn.Module | Network, images: Tensor, statistics: Statistics | None = None, *, twice: bool = False
) -> Forward:
    """Logits of ``images`` (B, *shape) by the model's network; of a part of a network, its output.

    In training mode batch norms use and return their batch's statistics, and update the running ones as torch does.
    With ``statistics`` given they use those and update nothing. In evaluation mode they are merged into the layer
    before them, as in the certified network. The pass is differentiable once, or ``twice``, which is slower.
    """
    network = trace(model, images.shape[1:]).with_statistics(statistics)
    operations, last_use = network.operations, network.last_use
    ops = kernels.reference if twice else kernels
    values, collected = {0: images}, dict[int, BatchStatistics]()
    for step in network.steps:
        operation, norm, rest = operations[step[0]], network.norm_of(step), list(step)
        inputs = [values[read] for read in operation.inputs]
        for read in {read for read in operation.inputs if last_use[read] == step[0]}:
            del values[read]
        fixed = norm is not None and not (norm.learns and statistics is None)
        if norm is not None and fixed and isinstance(operation, Affine) and operation.takes_norm(inputs[0].ndim):
            if statistics is None:
                operation.prepare()
            inputs, rest = [operation.with_norm(*norm.coefficients())(*inputs)], rest[2:]
        for number in rest:
            operation = operations[number]
            if isinstance(operation, Affine):
                operation.prepare()
            if isinstance(operation, BatchNorm) and operation.learns and statistics is None:
                output, collected[number] = operation.of_batch(inputs[0], ops)
            else:
                output = operation(*inputs)
            inputs = [output]
        values[step[-1]] = inputs[0]
        del inputs
    return Forward(values[len(operations) - 1], collected if statistics is None else statistics)
