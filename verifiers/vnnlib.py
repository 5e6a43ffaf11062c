"""Properties in VNN-LIB 1.0, the format of VNN-COMP (https://www.vnnlib.org), and their writer.

Asserts over inputs X_i and outputs Y_j state the *unsafe* set. Decimals are read exactly; conversion to floats rounds
outward for boxes, to nearest for output rows.
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

DIGITS = 1000  # limit for one decimal and for its exponent: exact fractions take as many digits


@dataclass(frozen=True)
class Case:
    """A box of inputs and its unsafe set: the points where in some clause every row has <row, outputs> + offset <= 0.

    Args:
        lower, upper: (N,) float64, ends of the box, rounded outward.
        ends: (lower, upper) of each input, exactly as read.
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
        """(N,) ``lower`` rounded down to float32; -inf where no float32 is that low."""
        return _outward32(self.lower, -math.inf)

    @property
    def upper32(self) -> Tensor:
        """(N,) ``upper`` rounded up to float32; inf where no float32 is that high."""
        return _outward32(self.upper, math.inf)

    def written(self, point: Tensor) -> list[str] | None:
        """Decimals within the box as read, nearest to a point (N,) float64; None if an input has none.

        Each is the entry's shortest decimal where that lies within the ends, else the end that it oversteps, with as
        many digits as needed.
        """
        texts = [_decimal_within(value, *ends) for value, ends in zip(as_floats(point + 0.0), self.ends, strict=True)]
        written = [text for text in texts if text is not None]
        return written if len(written) == len(texts) else None


@dataclass(frozen=True)
class Property:
    """A property, which is violated if and only if, for some case, a point of the box has unsafe outputs. Ties are
    unsafe.

    Args:
        cases: the cases; empty where no point is unsafe, whatever the network.
        remark: a note on disjuncts that no input satisfies, which are left out; None without any.
    """

    cases: tuple[Case, ...]
    remark: str | None = None


def write_property(path: str | Path, lower: Tensor, upper: Tensor, label: int, classes: int) -> None:
    """Write the property that class ``label`` wins against every other on a box: Y_j >= Y_label is unsafe, j != label.

    Ends are written with nine digits. Neither the decimals nor the float32 that they round to lie inside the given
    ends: each rounds to the end itself where that is a float32, else to the next one outside.

    Args:
        lower, upper: ends of the box, floats of one shape, flattened in order (C, H, W).
    Raises:
        InputError: ends that are not finite in float32, of different shapes, or crossed; a label that is no class.
    """
    if lower.shape != upper.shape or not lower.numel() or not (lower.is_floating_point() and upper.is_floating_point()):
        found = f"{lower.dtype} {(*lower.shape,)} and {upper.dtype} {(*upper.shape,)}"
        raise InputError(f"box: found {found}; accepted: two tensors of floats of one shape, not empty")
    if classes < 2 or label not in range(classes):  # a fraction is not in the range either
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
    """A decimal in [lower, upper] at or next to ``value``; None if it would need too many digits."""
    text = repr(value)
    near = Fraction(text)
    if lower <= near <= upper:
        return text
    end, rounding = (lower, ROUND_CEILING) if near < lower else (upper, ROUND_FLOOR)
    for digits in (16, 17, 20, 50, 4 * DIGITS):  # the last holds whatever decimal was read
        context = Context(prec=digits, rounding=rounding)
        decimal = context.divide(Decimal(end.numerator), Decimal(end.denominator))
        if lower <= Fraction(decimal) <= upper:
            return str(decimal).replace("E", "e")
    return None
