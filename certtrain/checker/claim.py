"""Claims to be proved: on each box, no disjunct holds. A disjunct holds at x if all its rows do,
<row, output> + offset <= 0; so a positive lower bound of one row, or of a sum of rows with
weights >= 0, on the box refutes it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import Numbers, demand


@dataclass(frozen=True)
class Disjunct:
    """Args: box: number of its box. rows: (G, outputs); offsets: (G,), float64 or fractions."""

    box: int
    rows: Any
    offsets: Any


@dataclass(frozen=True)
class Claim:
    """Args: boxes: (lower, upper) each, float64 rounded outward, or fractions."""

    boxes: list[tuple[Any, Any]]
    disjuncts: list[Disjunct]


def robustness(lower: Any, upper: Any, label: Any, outputs: int, arithmetic: Numbers) -> Claim:
    """The claim that an output is the largest on a box: one disjunct for each other output."""
    known = type(label) is int and 0 <= label < outputs
    demand(known, f"label {label!r}: the network has {outputs} outputs")
    demand((lower <= upper).all(), "the box: a lower end above its upper end")
    unit, zero = arithmetic.numbers(np.eye(outputs)), arithmetic.zeros(1)
    rows = [unit[label : label + 1] - unit[j : j + 1] for j in range(outputs) if j != label]
    ends = arithmetic.numbers(lower), arithmetic.numbers(upper)
    return Claim([ends], [Disjunct(0, row, zero) for row in rows])
