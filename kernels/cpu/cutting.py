"""Bounds over cut boxes, four multipliers in one pass over a form and a cut, which stay in the processor's cache."""

import numpy as np
import torch
from torch import Tensor

from ..reference.cutting import FIRST, LAST
from .threads import Array, array, jit, run


@jit(reassociate=True, inline=True)
def _norm(values: Array, zero: float) -> float:
    """|values|_1."""
    total = zero
    for i in range(values.shape[0]):
        total += abs(values[i])
    return total


@jit(reassociate=True, inline=True)
def _norms(
    form: Array, cut: Array, one: float, two: float, three: float, four: float, zero: float
) -> tuple[float, float, float, float]:
    """|form + t cut|_1 for four numbers t."""
    a, b, c, d = zero, zero, zero, zero
    for i in range(form.shape[0]):
        f, g = form[i], cut[i]
        a += abs(f + one * g)
        b += abs(f + two * g)
        c += abs(f + three * g)
        d += abs(f + four * g)
    return a, b, c, d


@jit(reassociate=True)
def _minima(
    first: int, last: int, forms: Array, constants: Array, sizes: Array, cuts: Array, offsets: Array, rows: Array,
    out: Array, multiples: Array, fifth: float, zero: float, infinity: float,
) -> None:  # fmt: skip
    """Items are entries of ``rows``. Comparisons leave out duals that are not finite.

    ``sizes`` are the forms' norms, or -1 where none is known yet: threads that meet there write the same number.
    """
    count = rows.shape[1]
    item, k = first // count, first % count - 1
    before, cut, offset, norm = -1, cuts[0], zero, zero
    for _ in range(first, last):
        k += 1
        if k == count:
            item, k = item + 1, 0
        row = rows[item, k]
        if row < 0:
            continue
        if item != before:
            before, cut, offset = item, cuts[item], offsets[item]
            norm = _norm(cut, zero)
        form, size = forms[row], sizes[row]
        if size < zero:
            size = _norm(form, zero)
            sizes[row] = size
        best = -size
        if norm > zero and size > zero:
            unit = size / norm
            one, two, three, four = (
                unit * multiples[0], unit * multiples[1], unit * multiples[2], unit * multiples[3]
            )  # fmt: skip
            a, b, c, d = _norms(form, cut, one, two, three, four, zero)
            a, b, c, d = one * offset - a, two * offset - b, three * offset - c, four * offset - d
            low, high = zero, zero
            if best < a < infinity:
                best, low, high = a, zero, two
            if best < b < infinity:
                best, low, high = b, one, three
            if best < c < infinity:
                best, low, high = c, two, four
            if best < d < infinity:
                best, low, high = d, three, unit * multiples[4]
            if high > zero:
                step = (high - low) * fifth
                one = low + step  # an int times float32 would be float64
                two = one + step
                three = two + step
                four = three + step
                a, b, c, d = _norms(form, cut, one, two, three, four, zero)
                a, b, c, d = one * offset - a, two * offset - b, three * offset - c, four * offset - d
                for value in (a, b, c, d):
                    if best < value < infinity:
                        best = value
        best += constants[row]
        if best < infinity:
            out[item, k] = best


def cut_box_minima(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    out = constants.new_full(rows.shape, -torch.inf)
    sizes = torch.full_like(constants, -1)
    kind = np.float32 if forms.dtype == torch.float32 else np.float64
    arrays = [array(t, *t.shape) for t in (forms, constants, sizes, cuts, offsets, rows, out)]
    multiples, numbers = np.array([*FIRST, LAST], dtype=kind), (kind(0.2), kind(0), kind(np.inf))
    run(_minima, rows.numel(), rows.numel() * forms.shape[1] * 16, *arrays, multiples, *numbers)
    return out
