"""A network: operations in an order in which every input comes first.

It has two states. As traced, its operations refer to the model's own layers, so it follows their weights, and batch
norms and activations stand by themselves: training bounds this one. Folded (``folding.py``), the weights are fixed
tensors, batch norms have gone into them, and the shapes are known: this one is certified, searched and exported.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .interval import Bounds
from .operations.affine import Affine
from .operations.base import Nonlinear, Operation, UnsupportedNode
from .operations.batch_norm import BatchNorm, BatchStatistics
from .operations.opaque import Opaque
from .operations.rearrangement import Rearrangement
from .operations.relu import Relu

if TYPE_CHECKING:
    from .rounding import Rounding

__all__ = ["Network", "NetworkModule", "Statistics", "UnsupportedNode"]

Statistics = Mapping[int, BatchStatistics]
"""Batch statistics by the position of their batch norm in the network."""


@dataclass(frozen=True, eq=False)
class Network:
    """Operations of which the first is the input and the last one gives the output.

    Args:
        shapes: of the operations' outputs, without the batch dimension; of a folded network.
        rounding: the arithmetic that all bounds hold in, whatever float64 rounds on the way; None for that of the
            weights, as computed. Of a folded network in float64.
    """

    operations: tuple[Operation, ...]
    shapes: tuple[torch.Size, ...] = ()
    rounding: Rounding | None = None

    @cached_property
    def nonlinear(self) -> tuple[int, ...]:
        """Positions of the non-linear operations."""
        return tuple(number for number, operation in enumerate(self.operations) if isinstance(operation, Nonlinear))

    def relaxed(self, number: int) -> Nonlinear:
        """The non-linear operation at a position of ``nonlinear``."""
        operation = self.operations[number]
        assert isinstance(operation, Nonlinear)
        return operation

    @property
    def piecewise_linear(self) -> bool:
        return all(self.relaxed(number).piecewise_linear for number in self.nonlinear)

    def shape(self, number: int, read: int) -> torch.Size:
        """The shape of what an operation reads, in a folded network."""
        return self.shapes[read]

    def together(self, bounds: Sequence[Bounds]) -> Bounds:
        """Bounds of all that a non-linear operation reads, as one: those of several inputs flattened, in order."""
        if len(bounds) == 1:
            return bounds[0]
        lower, upper = [x.lower.flatten(1) for x in bounds], [x.upper.flatten(1) for x in bounds]
        return Bounds(torch.cat(lower, 1), torch.cat(upper, 1))

    def apart(self, number: int, bounds: Bounds) -> list[Bounds]:
        """The bounds of each input of an operation, of ``together``."""
        shapes = self.read_shapes(number)
        if len(shapes) == 1:
            return [bounds]
        sizes = [shape.numel() for shape in shapes]
        ends = zip(torch.split(bounds.lower, sizes, 1), torch.split(bounds.upper, sizes, 1), shapes, strict=True)
        return [Bounds(low.reshape(len(low), *shape), up.reshape(len(low), *shape)) for low, up, shape in ends]

    def read_shapes(self, number: int) -> list[torch.Size]:
        """The shapes of an operation's inputs, in a folded network."""
        return [self.shapes[read] for read in self.operations[number].inputs]

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """For each operation the position of the last one that reads it: its value may be dropped afterwards."""
        last = list(range(len(self.operations)))
        for position, operation in enumerate(self.operations):
            for read in operation.inputs:
                last[read] = position
        return tuple(last)

    @cached_property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """The positions after the input. An affine operation, the batch norm that alone reads it, and the ReLU that
        alone reads that, are one step: what fused kernels compute at once."""
        readers = Counter(read for operation in self.operations for read in operation.inputs)
        readers[len(self.operations) - 1] += 1
        steps: list[list[int]] = []
        step_of: dict[int, list[int]] = {}
        for position, operation in enumerate(self.operations[1:], start=1):
            before = step_of.get(operation.inputs[0]) if len(operation.inputs) == 1 else None
            if before is not None and before[-1] == operation.inputs[0] and readers[before[-1]] == 1:
                kinds = [type(self.operations[number]) for number in before]
                if isinstance(self.operations[before[0]], Affine) and (
                    (isinstance(operation, BatchNorm) and len(kinds) == 1)
                    or (isinstance(operation, Relu) and not issubclass(kinds[-1], Relu))
                ):
                    before.append(position)
                    step_of[position] = before
                    continue
            step_of[position] = [position]
            steps.append(step_of[position])
        return tuple(tuple(step) for step in steps)

    def norm_of(self, step: Sequence[int]) -> BatchNorm | None:
        """The batch norm of one of ``steps``, behind its affine operation."""
        norm = self.operations[step[1]] if len(step) > 1 else None
        return norm if isinstance(norm, BatchNorm) else None

    def affine_before(self, position: int) -> Operation:
        """The affine operation whose output, perhaps through batch norms and activations, an operation reads; else
        the operation itself."""
        operation = found = self.operations[position]
        while len(found.inputs) == 1 and not isinstance(found, Affine):
            found = self.operations[found.inputs[0]]
            if not isinstance(found, (Affine, BatchNorm)):
                return operation
        return found if isinstance(found, Affine) else operation

    def with_statistics(self, statistics: Statistics | None) -> Network:
        """The network whose batch norms use these batch statistics."""
        if not statistics:
            return self
        operations = [
            replace(operation, statistics=statistics[position])
            if position in statistics and isinstance(operation, BatchNorm)
            else operation
            for position, operation in enumerate(self.operations)
        ]
        network = Network(tuple(operations), self.shapes, self.rounding)
        network.__dict__.update(steps=self.steps, last_use=self.last_use)  # not worked out anew at every training step
        return network

    def __call__(self, images: Tensor) -> Tensor:
        return self.values(images)[-1]

    def values(self, images: Tensor) -> list[Tensor]:
        """Every operation's output at ``images`` (B, *shape)."""
        values = [images]
        for operation in self.operations[1:]:
            values.append(operation(*(values[read] for read in operation.inputs)))
        return values


class NetworkModule(nn.Module):
    """A module that is its network from the start: what the readers of network files make.

    Args:
        operations: the last one gives the output. What it does not need is left out.
    """

    def __init__(self, operations: Sequence[Operation]):
        super().__init__()
        self.operations = list(operations)
        needed = _needed(self.operations)
        self.network = Network(ending_with(needed, len(needed) - 1))
        self.layers = nn.ModuleList(  # of the operations as given
            value for operation in self.operations for value in vars(operation).values() if isinstance(value, nn.Module)
        )
        self.eval()

    @property
    def runs(self) -> nn.Module | None:
        """The module that it does nothing but run, if so: it was not looked into."""
        *before, last = self.network.operations
        if len(before) == 1 and isinstance(last, Opaque) and isinstance(last.function, nn.Module):
            return last.function
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkModule:
        return NetworkModule(copy.deepcopy(self.operations, memo))

    def forward(self, x: Tensor) -> Tensor:
        from .forward import forward  # which asks for the network of a module, this one for instance

        return forward(self, x).logits


def _needed(operations: Sequence[Operation]) -> list[Operation]:
    """Those that the last one depends on, and the input."""
    wanted = {0, len(operations) - 1}
    for number in range(len(operations) - 1, 0, -1):
        wanted |= set(operations[number].inputs) if number in wanted else set()
    place = {old: new for new, old in enumerate(sorted(wanted))}
    return [moved(operations[old], *(place[read] for read in operations[old].inputs)) for old in place]


def moved(operation: Operation, *inputs: int) -> Operation:
    """The operation at other inputs."""
    return replace(operation, inputs=inputs)


def ending_with(operations: Sequence[Operation], output: int) -> tuple[Operation, ...]:
    """Operations of which ``output`` comes last."""
    if output == len(operations) - 1:
        return tuple(operations)
    return (*operations, Rearrangement("output", (output,), lambda x: x))
