"""How much work a folded network's operations are, in multiplications, about: what time is estimated by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from .network import Network


def work_of(network: Network, position: int, numbers: Callable[[int], int]) -> dict[str, float]:
    """By kind, of a pass from an operation back to the input, given how many numbers there are at each on the way."""
    found, wanted = Counter[str](), {position}
    for number in range(position, 0, -1):
        if number in wanted:
            operation = network.operations[number]
            wanted |= set(operation.inputs)
            found[type(operation).__name__] += operation.work(numbers(number))
    return dict(found)
