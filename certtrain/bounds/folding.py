"""Fold an nn.Module into a network with fixed weights and known shapes; batch norms are merged into weights.

Each operation implements its own ``fold``. Max pools become ReLUs, max(a, b) = b + relu(a - b); dropout is removed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .network import Network, NetworkModule, Statistics
from .operations import Affine, Input, Operation, UnsupportedOperation
from .tracing import trace


def fold(
    model: nn.Module,
    shape: torch.Size,
    statistics: Statistics | None = None,
    dtype: torch.dtype | None = None,
    *,
    whole_pools: bool = False,
    as_written: bool = False,
) -> Network:
    """The folded network of a model for images of ``shape`` (without the batch dimension).

    Args:
        statistics: batch statistics instead of the running ones, with gradients, for training.
        dtype: of the weights; None keeps the model's. Weights keep their gradients.
        whole_pools: keep max pools; the network can then be evaluated, but has no linear bounds.
        as_written: keep the operators of a network file: batch norms are not merged, and constants stay in float64
            instead of being rounded to float32. Use with ``dtype=torch.float64``; no effect on other models.
    Raises:
        UnsupportedOperation: the model contains an operation without a rule.
        InputError: a weight is not finite.
    """
    written = as_written and isinstance(model, NetworkModule)
    folding = _Folding(model, torch.Size(shape), dtype, whole_pools, written, finite=statistics is None)
    return folding.run(trace(model, torch.Size(shape)).with_statistics(statistics))


class _Folding:
    """A folded network under construction, to which an operation's ``fold`` appends.

    Args:
        finite: refuse weights that are not finite. Training steps check their loss instead.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: torch.Size,
        dtype: torch.dtype | None,
        whole_pools: bool,
        as_written: bool,
        finite: bool,
    ):
        self.dtype, self.whole_pools, self.as_written, self.checks = dtype, whole_pools, as_written, finite
        parameter = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.model_dtype = torch.float32 if parameter is None else parameter.dtype
        self.operations: list[Operation] = [Input("input", ())]
        self.shapes = [shape]

    def run(self, network: Network) -> Network:
        operations, place = network.operations, {0: 0}  # position in ``network`` → position in the folded network
        needed = {len(operations) - 1}  # operations that the logits do not depend on are left out
        for number in range(len(operations) - 1, 0, -1):
            needed |= set(operations[number].inputs) if number in needed else set()
        for step in network.steps:
            if step[0] not in needed:
                continue
            operation, norm, rest = operations[step[0]], network.norm_of(step), list(step[1:])
            sources = [place[read] for read in operation.inputs]
            if isinstance(operation, Affine) and norm is not None and not self.as_written:
                dimensions = 1 + len(self.shapes[sources[0]])
                if operation.takes_norm(dimensions):  # in the model's own dtype, as it runs
                    operation, rest = operation.with_norm(*norm.coefficients()), rest[1:]
            position = operation.fold(self, *sources)
            for number in rest:
                position = operations[number].fold(self, position)
            place[step[-1]] = position
        return Network(tuple(self.operations), tuple(self.shapes))

    def append(self, operation: Operation) -> int:
        """Append an operation and return its position. Its output shape is found by evaluating it at zeros."""
        points = [torch.zeros(1, *self.shapes[i], dtype=self.dtype or self.model_dtype, device=self.device)
                  for i in operation.inputs]  # fmt: skip
        with torch.no_grad():
            self.shapes.append(operation(*points).shape[1:])
        self.operations.append(operation)
        return len(self.operations) - 1

    def tensor(self, value: Tensor | float, path: str) -> Tensor:
        """A constant, rounded to the model's dtype and then converted to the folded network's."""
        constant = torch.as_tensor(value, dtype=self.model_dtype, device=self.device)
        return self.finite(constant.to(self.dtype or self.model_dtype), path)

    def finite(self, weight: Tensor, path: str) -> Tensor:
        """``weight``, checked to be finite if this folding checks."""
        if self.checks and not weight.isfinite().all():
            raise UnsupportedOperation(f"{path}: found a weight that is not finite; accepted: finite weights")
        return weight
