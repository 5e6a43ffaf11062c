"""Approximate work of a folded network's operations in multiplications, from which time is estimated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from .network import Network


def work_of(network: Network, position: int, numbers: Callable[[int], int]) -> dict[str, float]:
    """Work of a backward pass from ``position`` to the input, by kind of operation.

    Args:
        numbers: how many numbers of coefficients there are at each position.
    """
    work, wanted = Counter[str](), {position}
    for number in range(position, 0, -1):
        if number in wanted:
            operation = network.operations[number]
            wanted |= set(operation.inputs)
            work[type(operation).__name__] += operation.work(numbers(number))
    return dict(work)
