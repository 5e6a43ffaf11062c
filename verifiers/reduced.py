"""A network over one box, reduced to the neurons that are unstable there.

All other neurons are linear over the box. Multiplied out, each unstable neuron's input is a linear function of the
network's inputs and of the unstable neurons before it. Where these are few, as certified training makes them, the
network is many times smaller than it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import Bounds, Box, Region
from ..bounds.crown import backward, rows_at_a_time
from ..bounds.network import Network, with_inputs
from ..bounds.operations import Dense, Input, Operation, Sum, Weights
from ..bounds.relaxation import Lines
from .neurons import Columns, Neurons
from .tighter_bounds import work_of_a_row

FASTER = 2.0
"""How many times the whole network's multiplications a reduced network may take and be used: it consists of products of
matrices, which are faster than convolutions."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """A reduced network over one image's box.

    Args:
        network: of flat inputs, with the same outputs over the box; box: (1, inputs).
        columns: (C,) the columns of its neurons.
    """

    network: Network
    box: Box
    columns: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, nearly all that it takes."""
        layers = (operation.layer for operation in self.network.operations if isinstance(operation, Dense))
        return sum(layer.weight.nbytes for layer in layers)


def reduced(
    network: Network, region: Region, bounds: Mapping[int, Bounds], columns: Columns, room: float = math.inf
) -> Reduced | None:
    """Reduce a piecewise linear network over the hull of one image's region; None if that is not worth while, needs
    more than ``room`` bytes, or a bound is NaN.

    Args:
        bounds: of every non-linear operation's input, by position, (1, *shape).
        columns: of one subproblem, the neurons that may be unstable.
    """
    neurons = Neurons.of(network)
    lower, upper = neurons.ends(bounds, region.hull.center)
    chosen = columns.real[0] & ((lower < 0) & (upper > 0))[0, columns.neurons[0]]
    known = not bool((lower.isnan() | upper.isnan()).any())  # else stable neurons cannot be told
    work = _work(network, [int(part.sum()) for part in _split(chosen, columns)])
    small = work <= FASTER * work_of_a_row(network, len(network.operations) - 1)
    if not (bool(chosen.any()) and known and small and work * lower.element_size() <= room):
        return None
    numbers = dict[int, Tensor]()  # by position: the numbers of the unstable neurons in the operation's input
    first = 0
    for place, size, part, own in zip(
        neurons.places, neurons.sizes, _split(columns.neurons[0], columns), _split(chosen, columns), strict=True
    ):
        numbers[place] = part[own] - first
        first += size
    lines = {place: _linear_part(network, place, bounds[place], numbers[place]) for place in neurons.places}
    builder = _Builder(network, lines, numbers)
    for place in neurons.places:
        if len(numbers[place]):
            builder.add_neurons(place)
    last = len(network.operations) - 1
    builder.add_affine(last, torch.arange(network.shapes[last].numel(), device=lower.device))
    hull = region.hull
    small = Network(tuple(builder.operations), tuple(builder.shapes))
    return Reduced(small, Box(hull.lower.flatten(1), hull.upper.flatten(1)), chosen.nonzero().flatten())


def _split(values: Tensor, columns: Columns) -> tuple[Tensor, ...]:
    return torch.split(values, list(columns.sizes))


def _work(network: Network, counts: list[int]) -> float:
    """Multiplications of one linear form's way through a network reduced to ``counts`` neurons of each operation, at
    most, which are as many as its weights."""
    inputs, outputs = network.shapes[0].numel(), network.shapes[-1].numel()
    work, before = 0.0, inputs
    for count in [*counts, outputs]:
        work += count * before
        before += count
    return work


def _linear_part(network: Network, place: int, bounds: Bounds, unstable: Tensor) -> Lines:
    """Lines that equal an operation where its neurons are stable, and are 0 for the unstable ones."""
    slope = torch.ones_like(bounds.lower).masked_fill(~(bounds.lower >= 0), network.nonlinear_at(place).kink)
    slope.view(-1)[unstable] = 0.0
    return Lines(slope, slope, torch.zeros_like(slope), rising=True)


class _Builder:
    """The operations of the reduced network so far."""

    def __init__(self, network: Network, lines: Mapping[int, Lines], numbers: Mapping[int, Tensor]):
        self.network, self.lines, self.numbers = network, lines, numbers
        self.operations: list[Operation] = [Input("input", ())]
        self.shapes = [torch.Size([network.shapes[0].numel()])]
        self.outputs = dict[int, int]()  # by position: of the unstable neurons' outputs

    def add_neurons(self, place: int) -> None:
        operation = self.network.nonlinear_at(place)
        at = self.add_affine(operation.inputs[0], self.numbers[place])
        self.outputs[place] = self._append(with_inputs(operation, at), len(self.numbers[place]))

    def add_affine(self, position: int, entries: Tensor) -> int:
        """Add ``entries`` of an operation's output, as a function of the inputs and of the neurons so far."""
        weights, bias, from_neurons = self._coefficients(position, entries)
        at = self._append(Dense("", (0,), Weights(weights, bias)), len(entries))
        for place, own in from_neurons.items():
            other = self._append(Dense("", (self.outputs[place],), Weights(own, None)), len(entries))
            at = self._append(Sum("", (at, other)), len(entries))
        return at

    def _append(self, operation: Operation, size: int) -> int:
        self.operations.append(operation)
        self.shapes.append(torch.Size([size]))
        return len(self.operations) - 1

    def _coefficients(self, position: int, entries: Tensor) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        shape = self.network.shapes[position]
        weights, biases, from_neurons = list[Tensor](), list[Tensor](), list[dict[int, Tensor]]()
        like = next(iter(self.lines.values())).lower_slope
        for part in torch.split(entries, rows_at_a_time(self.network, 1, like)):
            units = like.new_zeros(len(part), shape.numel()).scatter_(1, part.unsqueeze(1), 1.0)
            reached = dict[int, Tensor]()
            linear = backward(self.network, position, units.reshape(1, len(part), *shape), self.lines, reached=reached)
            weights.append(linear.forms[0].flatten(1))
            biases.append(linear.constants[0])
            from_neurons.append({at: forms[0].flatten(1)[:, self.numbers[at]] for at, forms in reached.items()})
        places = [at for at in self.outputs if at in from_neurons[0]]
        return (
            torch.cat(weights),
            torch.cat(biases),
            {at: torch.cat([own[at] for own in from_neurons]) for at in places},
        )
