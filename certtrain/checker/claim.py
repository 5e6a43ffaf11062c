"""Claims to be proved: on each box, no disjunct holds. A disjunct holds at x if all its rows do,
<row, output> + offset <= 0; so a positive lower bound of one row, or of a sum of rows with
weights >= 0, on the box refutes it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import Numbers, Rejected


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
    if not (type(label) is int and 0 <= label < outputs):
        raise Rejected(f"label {label!r}: the network has {outputs} outputs")
    check_box(lower, upper)
    rows = np.zeros((outputs, outputs))
    rows[:, label] = 1
    rows -= np.eye(outputs)
    zero = arithmetic.zeros(1)
    others = [j for j in range(outputs) if j != label]
    disjuncts = [Disjunct(0, arithmetic.numbers(rows[j : j + 1]), zero) for j in others]
    return Claim([(arithmetic.numbers(lower), arithmetic.numbers(upper))], disjuncts)


def check_box(lower, upper):
    if lower.shape != upper.shape or lower.ndim != 1 or not (lower <= upper).all():
        raise Rejected("the box: a lower end above its upper end, or ends of other sizes")
