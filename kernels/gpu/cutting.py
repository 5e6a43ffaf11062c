# Triton bodies: their pointers have no types, and an annotation would change what is compiled.
# pyright: basic
"""Bounds over cut boxes: a program reads a block of forms and their cut twice, for four multipliers each time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.cutting import FIRST, LAST
from .launch import accumulator, launch, wide

ENTRIES = 1024
"""Entries of forms that a program holds at a time: four sums of each are 32 registers per thread."""
FORMS = 4
"""Most forms of a program, which share what it reads of the cut."""


@triton.jit
def _duals(
    forms, cuts, row, item, inside, offset, one, two, three, four, entries,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """t offset - |form + t cut|_1 for four numbers t of each form; -inf where that is not finite."""
    zero = tl.zeros([BLOCK_F, BLOCK_N], one.dtype)
    a, b, c, d = zero, zero, zero, zero
    for start in range(0, entries, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N))[None, :]
        f = wide(tl.load(forms + row[:, None] * entries + n, inside[:, None] & (n < entries), 0.0))
        g = wide(tl.load(cuts + item * entries + n, n < entries, 0.0))
        a += tl.abs(f + one[:, None] * g)
        b += tl.abs(f + two[:, None] * g)
        c += tl.abs(f + three[:, None] * g)
        d += tl.abs(f + four[:, None] * g)
    a, b = _finite(one * offset - tl.sum(a, 1)), _finite(two * offset - tl.sum(b, 1))
    return a, b, _finite(three * offset - tl.sum(c, 1)), _finite(four * offset - tl.sum(d, 1))


@triton.jit
def _finite(values):
    return tl.where(values < float("inf"), values, -float("inf"))


@triton.jit
def _minima(
    forms, constants, sizes, cuts, offsets, norms, rows, out, count, entries,
    M1: tl.constexpr, M2: tl.constexpr, M3: tl.constexpr, M4: tl.constexpr, LAST: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One cut and a block of its forms."""
    blocks = tl.cdiv(count, BLOCK_F)
    item = tl.program_id(0).to(tl.int64) // blocks
    k = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    row = tl.load(rows + item * count + k, k < count, -1)
    inside = row >= 0
    size, norm = tl.load(sizes + row, inside, 0.0), tl.load(norms + item)
    constant, offset = wide(tl.load(constants + row, inside, 0.0)), wide(tl.load(offsets + item))
    unit = size / tl.where(norm > 0, norm, float("inf"))  # 0 without a cut: nothing is gained

    one, two, three, four = unit * M1, unit * M2, unit * M3, unit * M4
    a, b, c, d = _duals(
        forms, cuts, row, item, inside, offset, one, two, three, four, entries, BLOCK_F, BLOCK_N
    )  # fmt: skip
    best, low, high = -size, tl.zeros_like(size), tl.zeros_like(size)
    high, best = tl.where(a > best, two, high), tl.where(a > best, a, best)
    low, high, best = tl.where(b > best, one, low), tl.where(b > best, three, high), tl.where(b > best, b, best)
    low, high, best = tl.where(c > best, two, low), tl.where(c > best, four, high), tl.where(c > best, c, best)
    low, high = tl.where(d > best, three, low), tl.where(d > best, unit * LAST, high)
    best = tl.where(d > best, d, best)

    gained = high > 0
    step = (high - low) / 5
    one, two, three, four = low + step, low + 2 * step, low + 3 * step, low + 4 * step
    a, b, c, d = _duals(
        forms, cuts, row, item, inside & gained, offset, one, two, three, four, entries, BLOCK_F, BLOCK_N
    )  # fmt: skip
    second = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    best = (constant + tl.where(gained & (second > best), second, best)).to(out.dtype.element_ty)
    tl.store(out + item * count + k, best, inside & (wide(best) < float("inf")))


def cut_box_minima(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    (items, count), entries, acc = rows.shape, forms.shape[1], accumulator(forms.dtype)
    sizes, norms = (torch.linalg.vector_norm(t, 1, dim=1, dtype=acc) for t in (forms, cuts))
    out = constants.new_full((items, count), -torch.inf)
    block_f = min(triton.next_power_of_2(max(count, 1)), FORMS)
    block_n = min(triton.next_power_of_2(max(entries, 1)), ENTRIES // block_f)
    launch(
        _minima, items * triton.cdiv(count, block_f), forms, forms, constants, sizes, cuts, offsets, norms, rows, out,
        count, entries, M1=FIRST[0], M2=FIRST[1], M3=FIRST[2], M4=FIRST[3], LAST=LAST, BLOCK_F=block_f,
        BLOCK_N=block_n, fused=True,
    )  # fmt: skip
    return out
