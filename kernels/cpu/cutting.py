"""Bounds over cut boxes, four multipliers in one pass over a form and a cut, which stay in the processor's cache."""

import numpy as np
import torch
from torch import Tensor

from ..reference.cutting import FIRST, LAST
from .threads import Array, array, jit, run


@jit(reassociate=True, inline=True)
def _sizes(
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
    first: int, last: int, forms: Array, constants: Array, sizes: Array, cuts: Array, offsets: Array, norms: Array,
    rows: Array, out: Array, multiples: Array, fifth: float, zero: float,
) -> None:  # fmt: skip
    """Items are cuts."""
    for item in range(first, last):
        cut, offset, norm = cuts[item], offsets[item], norms[item]
        for k in range(rows.shape[1]):
            row = rows[item, k]
            if row < 0:
                continue
            form, constant, size = forms[row], constants[row], sizes[row]
            best = constant - size
            if norm > zero and size > zero:
                unit = size / norm
                one, two, three, four = (
                    unit * multiples[0], unit * multiples[1], unit * multiples[2], unit * multiples[3]
                )  # fmt: skip
                a, b, c, d = _sizes(form, cut, one, two, three, four, zero)
                a, b, c, d = one * offset - a, two * offset - b, three * offset - c, four * offset - d
                top = max(max(a, b), max(c, d))
                if constant + top > best:
                    best = constant + top
                    if top == a:
                        low, high = zero, two
                    elif top == b:
                        low, high = one, three
                    elif top == c:
                        low, high = two, four
                    else:
                        low, high = three, unit * multiples[4]
                    step = (high - low) * fifth
                    one, two, three, four = low + step, low + 2 * step, low + 3 * step, low + 4 * step
                    a, b, c, d = _sizes(form, cut, one, two, three, four, zero)
                    a, b, c, d = one * offset - a, two * offset - b, three * offset - c, four * offset - d
                    best = max(best, constant + max(max(a, b), max(c, d)))
            out[item, k] = best


def cut_box_minima(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    out = constants.new_full(rows.shape, -torch.inf)
    kind = np.float32 if forms.dtype == torch.float32 else np.float64
    sizes, norms = forms.abs().sum(1), cuts.abs().sum(1)
    arrays = [array(t, *t.shape) for t in (forms, constants, sizes, cuts, offsets, norms, rows, out)]
    multiples = np.array([*FIRST, LAST], dtype=kind)
    run(_minima, len(rows), rows.numel() * forms.shape[1] * 16, *arrays, multiples, kind(0.2), kind(0))
    return out
