"""VNN-LIB 1.0, the format of VNN-COMP (https://www.vnnlib.org): properties, and how they are written.

Asserts over inputs X_i and outputs Y_j state the *unsafe* set. Decimals are read exactly; what floats cannot hold is
rounded outward for boxes, to nearest for output rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..run_folder import write_atomically
from ..typed import as_floats

DIGITS = 1000  # of one decimal, and its largest exponent: exact fractions take as many


@dataclass(frozen=True)
class Case:
    """A box of inputs, and what is unsafe on it: in some clause every row holds <row, outputs> + offset <= 0.

    Args:
        lower, upper: (N,) float64, ends of the box: never inside the ends that were read.
        ends: (lower, upper) of each input as they were read, exactly.
        rows: (R, K) float64; offsets: (R,) float64.
        clauses: (R,) int64, the clause of each row, numbered from 0; there is at least one, and none is empty.
    """

    lower: Tensor
    upper: Tensor
    ends: tuple[tuple[Fraction, Fraction], ...]
    rows: Tensor
    offsets: Tensor
    clauses: Tensor

    @property
    def lower32(self) -> Tensor:
        """(N,) float32, the largest not above ``lower``; -inf where there is none."""
        return _outward32(self.lower, -math.inf)

    @property
    def upper32(self) -> Tensor:
        """(N,) float32, the smallest not below ``upper``; inf where there is none."""
        return _outward32(self.upper, math.inf)

    def written(self, point: Tensor) -> list[str] | None:
        """Decimals of the box as it was read, next to a point's (N,) float64 numbers; None where an input has none.

        They are the numbers' own shortest decimals where those lie within the ends, else the end that they overstep,
        with as many digits as it takes.
        """
        found = [_decimal_within(value, *ends) for value, ends in zip(as_floats(point + 0.0), self.ends, strict=True)]
        known = [text for text in found if text is not None]
        return known if len(known) == len(found) else None


@dataclass(frozen=True)
class Property:
    """Violated iff some case is: iff a point of its box has outputs that are unsafe there. Ties are unsafe.

    Args:
        cases: none where no point is unsafe, whatever the network.
        remark: on disjuncts that no input satisfies, which are no cases.
    """

    cases: tuple[Case, ...]
    remark: str | None = None


def write_property(path: str | Path, lower: Tensor, upper: Tensor, label: int, classes: int) -> None:
    """Write that class ``label`` wins against every other on a box: unsafe is Y_j >= Y_label for some other j.

    Nine digits are written: decimals that are never inside the given ends, nor are the float32 they round to: an end
    itself where it is a float32, else the next outside. Ends are floats of one shape, flattened in order (C, H, W).

    Raises:
        InputError: ends that are not finite in float32, of different shapes, or crossed; a label that is no class.
    """
    if lower.shape != upper.shape or not lower.numel() or not (lower.is_floating_point() and upper.is_floating_point()):
        found = f"{lower.dtype} {(*lower.shape,)} and {upper.dtype} {(*upper.shape,)}"
        raise InputError(f"box: found {found}; accepted: two tensors of floats of one shape, not empty")
    if classes < 2 or label not in range(classes):  # nor is a fraction
        raise InputError(f"label: found {label} of {classes} classes; accepted: 0 to classes - 1, of 2 classes or more")
    low, high = lower.detach().double().flatten().cpu(), upper.detach().double().flatten().cpu()
    ends32 = torch.stack([_outward32(low, -math.inf), _outward32(high, math.inf)])
    if not (ends32.isfinite().all() and (low <= high).all()):
        raise InputError("box: found ends that are crossed, or infinite or NaN in float32; accepted: lower <= upper")
    # nine digits are finer than half a float32 step: the decimals round back to the very float32
    down, up = (Context(prec=9, rounding=rounding) for rounding in (ROUND_FLOOR, ROUND_CEILING))
    lines = [f"(declare-const X_{i} Real)" for i in range(len(low))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    floors, ceilings = (as_floats(end) for end in ends32 + 0.0)  # + 0.0: there is no -0
    for i, (least, most) in enumerate(zip(floors, ceilings, strict=True)):
        lines.append(f"(assert (>= X_{i} {down.create_decimal_from_float(least)}))".replace("E", "e"))
        lines.append(f"(assert (<= X_{i} {up.create_decimal_from_float(most)}))".replace("E", "e"))
    losses = " ".join(f"(and (<= Y_{int(label)} Y_{j}))" for j in range(classes) if j != label)
    lines += [f"(assert (or {losses}))", ""]
    write_atomically(Path(path), lambda temporary: temporary.write_text("\n".join(lines)))


def _outward32(ends: Tensor, direction: float) -> Tensor:
    """Float64 ``ends`` as float32, rounded in the direction of ±inf."""
    near = ends.float()
    inside = near.double() > ends if direction < 0 else near.double() < ends
    return torch.where(inside, torch.nextafter(near, torch.full_like(near, direction)), near)


def _decimal_within(value: float, lower: Fraction, upper: Fraction) -> str | None:
    text = repr(value)
    near = Fraction(text)
    if lower <= near <= upper:
        return text
    end, rounding = (lower, ROUND_CEILING) if near < lower else (upper, ROUND_FLOOR)
    for digits in (16, 17, 20, 50, 4 * DIGITS):  # the last holds whatever decimal was read
        context = Context(prec=digits, rounding=rounding)
        found = context.divide(Decimal(end.numerator), Decimal(end.denominator))
        if lower <= Fraction(found) <= upper:
            return str(found).replace("E", "e")
    return None
