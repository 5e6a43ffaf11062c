"""A network: operations in topological order.

It has two states. As traced, its operations refer to the model's own layers and follow their weights, and batch norms
are separate operations: training bounds this state. Folded (``folding.py``), weights are fixed tensors with the batch
norms merged, and shapes are known: this state is certified, searched and exported.
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
from .operations.base import Nonlinear, Operation, UnsupportedOperation
from .operations.batch_norm import BatchNorm, BatchStatistics
from .operations.opaque import Opaque
from .operations.rearrangement import Rearrangement
from .operations.relu import Relu

if TYPE_CHECKING:
    from .rounding import Rounding

__all__ = ["Network", "NetworkModule", "Statistics", "UnsupportedOperation"]

Statistics = Mapping[int, BatchStatistics]
"""Batch statistics by the position of their batch norm in the network."""


@dataclass(frozen=True, eq=False)
class Network:
    """Operations, of which the first is the input and the last gives the output.

    Args:
        shapes: of the operations' outputs, without the batch dimension; for folded networks.
        rounding: the arithmetic of the network that bounds are proved for, including our own float64 rounding; None
            for bounds as computed in the weights' dtype. For folded networks in float64.
    """

    operations: tuple[Operation, ...]
    shapes: tuple[torch.Size, ...] = ()
    rounding: Rounding | None = None

    @cached_property
    def nonlinear(self) -> tuple[int, ...]:
        """Positions of the non-linear operations."""
        return tuple(number for number, operation in enumerate(self.operations) if isinstance(operation, Nonlinear))

    def nonlinear_at(self, number: int) -> Nonlinear:
        """The non-linear operation at one of the positions ``nonlinear``."""
        operation = self.operations[number]
        assert isinstance(operation, Nonlinear)
        return operation

    @property
    def piecewise_linear(self) -> bool:
        """Whether all non-linear operations are piecewise linear."""
        return all(self.nonlinear_at(number).piecewise_linear for number in self.nonlinear)

    @property
    def has_kinks(self) -> bool:
        """Whether any non-linear operation is piecewise linear."""
        return any(self.nonlinear_at(number).piecewise_linear for number in self.nonlinear)

    def shape(self, number: int, read: int) -> torch.Size:
        """The shape of the input at position ``read`` of operation ``number``, in a folded network."""
        return self.shapes[read]

    def join_bounds(self, bounds: Sequence[Bounds]) -> Bounds:
        """Bounds of all inputs of an operation as one: those of several inputs flattened and concatenated."""
        if len(bounds) == 1:
            return bounds[0]
        lower, upper = [x.lower.flatten(1) for x in bounds], [x.upper.flatten(1) for x in bounds]
        return Bounds(torch.cat(lower, 1), torch.cat(upper, 1))

    def split_bounds(self, number: int, bounds: Bounds) -> list[Bounds]:
        """The bounds of each input of operation ``number``; the inverse of ``join_bounds``."""
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
    def exact_intervals(self) -> tuple[bool, ...]:
        """For each operation of a folded network, whether its intervals over boxes are the exact ranges of its output:
        True of single entries of the input, of one linear map of different ones, and of what selects from these."""
        device = next((x.weight.device for x in self.operations if isinstance(x, Affine)), torch.device("cpu"))

        def fresh(shape: torch.Size) -> Tensor:
            return torch.arange(1.0, 1 + shape.numel(), dtype=torch.float64, device=device).reshape(1, *shape)

        # entries' numbers among those of the input or, once mixed, of the operation that mixed them
        known: list[tuple[Tensor, bool] | None] = [(fresh(self.shapes[0]), False)]
        for operation, shape in zip(self.operations[1:], self.shapes[1:], strict=True):
            parts = [part for read in operation.inputs if (part := known[read]) is not None]
            numbers, mixed = [part for part, _ in parts], any(part for _, part in parts)
            if len(parts) < len(operation.inputs) or isinstance(operation, Nonlinear):
                known.append(None)
            elif (own := operation.entries(*numbers)) is not None:
                known.append((own, mixed))
            else:
                used = torch.cat([part.flatten() for part in numbers]).sort().values
                twice = bool(((used[1:] == used[:-1]) & (used[1:] != 0)).any())
                known.append(None if mixed or twice else (fresh(shape), True))
        return tuple(part is not None for part in known)

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """For each operation the position of its last reader, after which its value can be dropped."""
        last = list(range(len(self.operations)))
        for position, operation in enumerate(self.operations):
            for read in operation.inputs:
                last[read] = position
        return tuple(last)

    @cached_property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        """Positions after the input, grouped into steps that fused kernels compute at once.

        A step is one operation, or an affine operation with the batch norm and the ReLU behind it, if each is the only
        reader of the one before.
        """
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
        """The batch norm of one of ``steps``, if it has one."""
        norm = self.operations[step[1]] if len(step) > 1 else None
        return norm if isinstance(norm, BatchNorm) else None

    def affine_before(self, position: int) -> Operation:
        """The affine operation before an operation, batch norms between them skipped; else the operation itself."""
        operation = before = self.operations[position]
        while len(before.inputs) == 1 and not isinstance(before, Affine):
            before = self.operations[before.inputs[0]]
            if not isinstance(before, (Affine, BatchNorm)):
                return operation
        return before if isinstance(before, Affine) else operation

    def with_statistics(self, statistics: Statistics | None) -> Network:
        """The network with these batch statistics in its batch norms."""
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
    """A module made of a network's operations, as readers of network files build it.

    Args:
        operations: the last one gives the output; those it does not depend on are left out.
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
        """The module that this one only runs, without rules for its contents; else None."""
        *before, last = self.network.operations
        if len(before) == 1 and isinstance(last, Opaque) and isinstance(last.function, nn.Module):
            return last.function
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkModule:
        return NetworkModule(copy.deepcopy(self.operations, memo))

    def forward(self, x: Tensor) -> Tensor:
        from .forward import forward  # imported here: ``forward`` imports this module

        return forward(self, x).logits


def _needed(operations: Sequence[Operation]) -> list[Operation]:
    """The input and the operations that the last one depends on, renumbered."""
    wanted = {0, len(operations) - 1}
    for number in range(len(operations) - 1, 0, -1):
        wanted |= set(operations[number].inputs) if number in wanted else set()
    place = {old: new for new, old in enumerate(sorted(wanted))}
    return [with_inputs(operations[old], *(place[read] for read in operations[old].inputs)) for old in place]


def with_inputs(operation: Operation, *inputs: int) -> Operation:
    """The operation with other input positions."""
    return replace(operation, inputs=inputs)


def ending_with(operations: Sequence[Operation], output: int) -> tuple[Operation, ...]:
    """The operations, with the output of ``output`` as the last one's."""
    if output == len(operations) - 1:
        return tuple(operations)
    return (*operations, Rearrangement("output", (output,), lambda x: x))
