"""nn.Module → its folded network: batch norms gone into weights, fixed tensors, known shapes.

Each operation says what it becomes. Max pools become ReLUs, max(a, b) = b + relu(a - b); dropout becomes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .network import Network, NetworkModule, Statistics
from .operations import Affine, Input, Operation, UnsupportedNode
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
        whole_pools: leave max pools as they are, which is good for evaluation alone.
        as_written: the operators of a network file stay what they are: batch norms are not folded, and constants are
            kept in float64, not rounded to float32. Goes with that dtype; says nothing to other models.
    Raises:
        UnsupportedNode: the model holds an operation without a rule.
        InputError: a weight is not finite.
    """
    written = as_written and isinstance(model, NetworkModule)
    folding = _Folding(model, torch.Size(shape), dtype, whole_pools, written, finite=statistics is None)
    return folding.run(trace(model).with_statistics(statistics))


class _Folding:
    """The network that is folded so far.

    Args:
        finite: refuse weights that are not. A training step looks at its loss instead.
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
        operations, place = network.operations, {0: 0}  # place of each of its operations among ours
        needed = {len(operations) - 1}  # what the logits do not depend on is left out
        for number in range(len(operations) - 1, 0, -1):
            needed |= set(operations[number].inputs) if number in needed else set()
        for step in network.steps:
            if step[0] not in needed:
                continue
            operation, norm, rest = operations[step[0]], network.norm_of(step), list(step[1:])
            sources = [place[read] for read in operation.inputs]
            if isinstance(operation, Affine) and norm is not None and not self.as_written:
                dimensions = 1 + len(self.shapes[sources[0]])
                if operation.takes_norm(dimensions):  # in the model's own dtype: that network is the one that runs
                    operation, rest = operation.with_norm(*norm.coefficients()), rest[1:]
            found = operation.fold(self, *sources)
            for number in rest:
                found = operations[number].fold(self, found)
            place[step[-1]] = found
        return Network(tuple(self.operations), tuple(self.shapes))

    def append(self, operation: Operation) -> int:
        """Its position. A point is sent through it, to learn its shape."""
        points = [torch.zeros(1, *self.shapes[i], dtype=self.dtype or self.model_dtype, device=self.device)
                  for i in operation.inputs]  # fmt: skip
        with torch.no_grad():
            self.shapes.append(operation(*points).shape[1:])
        self.operations.append(operation)
        return len(self.operations) - 1

    def tensor(self, value: Tensor | float, path: str) -> Tensor:
        """A constant in the model's dtype, and then in that of the folded network."""
        found = torch.as_tensor(value, dtype=self.model_dtype, device=self.device)
        return self.finite(found.to(self.dtype or self.model_dtype), path)

    def finite(self, found: Tensor, path: str) -> Tensor:
        if self.checks and not found.isfinite().all():
            raise UnsupportedNode(f"{path}: found a weight that is not finite; accepted: finite weights")
        return found
