"""How much work a folded network's operations are, in multiplications, about: what time is estimated by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from .folded import Convolution, Dense, Folded, Operation

ENTRYWISE = 8
"""Multiplications that an operation without products takes as long as, for each number."""


def work(operation: Operation, numbers: int) -> int:
    """For so many numbers of its output, forward or backward."""
    match operation:
        case Convolution():
            return numbers * operation.weight[0].numel()
        case Dense():
            return numbers * operation.weight.shape[1]
        case _:
            return ENTRYWISE * numbers


def work_of(network: Folded, position: int, numbers: Callable[[int], int]) -> dict[str, float]:
    """By kind, of a pass from an operation back to the input, given how many numbers there are at each on the way."""
    found, wanted = Counter[str](), {position}
    for number in range(position, 0, -1):
        if number in wanted:
            operation = network.operations[number]
            wanted |= set(operation.inputs)
            found[type(operation).__name__] += work(operation, numbers(number))
    return dict(found)
