"""Networks beside each other on shared inputs, and programs in which one of them is bounded by its difference from
another.

Of two networks of one graph the second's values are those of the first plus d, and d is computed layer by layer:
W' d + (W' - W) z + (b' - b) behind a linear layer, f(z + d) - f(z) behind an activation (``Operation.change``). Linear
bounds of a form in which both networks' outputs cancel then see d alone, whose relaxations err by its size at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..bounds.network import Network
from ..bounds.operations import Affine, Concat, Constants, Operation, Rearrangement, Scale, Sum, UnsupportedOperation
from ..bounds.rounding import FLOAT32


def difference_network(network: Network) -> Network | None:
    """A folded network of the same outputs: each of those that it concatenates, if it is made by the same graph as an
    earlier one with other weights, is that one plus a difference.

    Equal to the network in exact arithmetic, up to the rounding of differences of weights; with a ``rounding`` these
    are exact in float64.

    Returns:
        None where no two outputs are of one graph, an operation has no rule, or the rounding is float32's: differences
        round otherwise than the networks.
    """
    outputs, same = _concatenated(network), _merged(network)
    partners, pairs = dict[int, int](), dict[int, int]()
    for number, output in enumerate(outputs):
        for earlier in outputs[:number]:
            if output not in pairs and earlier not in pairs and _match(network, same, earlier, output, partners):
                pairs[output] = earlier
    if network.rounding == FLOAT32 or not pairs:
        return None
    try:
        return _DifferenceBuilder(network, partners, same).built(outputs, pairs)
    except UnsupportedOperation:
        return None


def _concatenated(network: Network) -> list[int]:
    """The positions of the values (B, K) whose concatenation is the network's output."""
    todo, outputs = [len(network.operations) - 1], list[int]()
    while todo:
        operation = network.operations[number := todo.pop(0)]
        if isinstance(operation, Concat) and len(network.shapes[number]) == 1:
            todo = [*operation.inputs, *todo]
        else:
            outputs.append(number)
    return outputs


def _merged(network: Network) -> list[int]:
    """By position, the first one whose value is known to be the same: the same moves of the input's entries."""
    first = torch.arange(1.0, 1 + network.shapes[0].numel(), dtype=torch.float64).reshape(1, *network.shapes[0])
    moved, same = {0: first}, list(range(len(network.operations)))
    for number, operation in enumerate(network.operations[1:], start=1):
        if isinstance(operation, (Rearrangement, Concat)) and all(read in moved for read in operation.inputs):
            own = operation.entries(*(moved[read] for read in operation.inputs))
            if own is not None:
                same[number] = next((other for other, known in moved.items() if torch.equal(known, own)), number)
                moved[number] = own
    return same


def _match(network: Network, same: Sequence[int], first: int, second: int, partners: dict[int, int]) -> bool:
    """Whether the operations that the value at ``second`` depends on are one by one of the classes of those of
    ``first``, up to values that are the ``same``; adds each one's partner to ``partners`` if so."""
    todo, found = [(first, second)], dict[int, int]()
    while todo:
        i, j = todo.pop()
        if same[i] == same[j]:
            continue
        one, other = network.operations[i], network.operations[j]
        known = partners.get(j, found.get(j, i))
        if known != i or i in partners or type(one) is not type(other) or len(one.inputs) != len(other.inputs):
            return False
        if j not in found:
            found[j] = i
            todo += zip(one.inputs, other.inputs, strict=True)
    if not found or found.keys() & found.values():
        return False
    partners |= found
    return True


class _DifferenceBuilder:
    """A network of values and of differences that grows (``Graph``).

    Args:
        partners: by position in the given network, that of the same operation in the other network.
        same: by position, the first one of the same value.
    """

    def __init__(self, given: Network, partners: Mapping[int, int], same: Sequence[int]):
        self.given, self.partners, self.same = given, partners, same
        self.like = next((one.weight for one in given.operations if isinstance(one, Affine)), torch.zeros(()))
        self.operations, self.shapes = [given.operations[0]], [given.shapes[0]]

    def built(self, outputs: Sequence[int], pairs: Mapping[int, int]) -> Network:
        """The network, of concatenated ``outputs``; ``pairs``: by output, the one that it is the change of."""
        operations, place = self.given.operations, {0: 0}
        for number in self._needed(output for output in outputs if output not in pairs):
            operation = operations[number]
            if isinstance(operation, Sum) and operation.maximum_of is not None:
                first, second = operation.maximum_of
                operation = replace(operation, maximum_of=(place[first], place[second]))
            place[number] = self.append(replace(operation, inputs=tuple(place[read] for read in operation.inputs)))
        changes = dict[int, int | None]()
        for number in sorted(self.partners):
            one, other = operations[self.partners[number]], operations[number]
            values = [place[read] for read in one.inputs]
            moves = [
                None if self.same[i] == self.same[j] else changes[j]
                for i, j in zip(one.inputs, other.inputs, strict=True)
            ]
            changes[number] = one.change(other, self, values, moves)
        parts = list[int]()
        for output in outputs:
            value, change = place[pairs.get(output, output)], changes.get(output) if output in pairs else None
            parts.append(value if change is None else self.append(Sum("changed", (value, change))))
        self.append(Concat("beside", tuple(parts), 1))
        return replace(self.given, operations=tuple(self.operations), shapes=tuple(self.shapes))

    def append(self, operation: Operation) -> int:
        points = [self.like.new_zeros(1, *self.shapes[read]) for read in operation.inputs]
        with torch.no_grad():
            self.shapes.append(operation(*points).shape[1:])
        self.operations.append(operation)
        return len(self.operations) - 1

    def zeros(self, value: int) -> int:
        zero = self.like.new_zeros(())
        return self.append(Scale("zero", (value,), Constants(zero, zero)))

    def difference(self, first: Tensor, second: Tensor) -> Tensor:
        result = second - first
        if self.given.rounding is not None:
            back = result - second  # the roundings of both terms (Knuth, The Art of Computer Programming, 4.2.2)
            if bool(((second - (result - back)) + (-first - back)).any()):
                raise UnsupportedOperation("found weights whose difference float64 rounds; accepted: an exact one")
        return result

    def _needed(self, outputs: Iterable[int]) -> list[int]:
        """The positions that outputs depend on, in order, without the input."""
        todo, needed = list(outputs), set[int]()
        while todo:
            number = todo.pop()
            if number and number not in needed:
                needed.add(number)
                todo += self.given.operations[number].inputs
        return sorted(needed)
