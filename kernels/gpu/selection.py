# Triton bodies: their pointers have no types, and an annotation would change what is compiled.
# pyright: basic
"""The k largest entries of a row, by bisection on integer keys, one bit per round, in registers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, wide

LANES = 4096
"""Keys that one program holds in registers: 32 per thread with four warps, 8 with sixteen. Longer rows are first
reduced to at most as many candidates."""


@triton.jit
def order_keys(values):
    """Integer keys in the order of the floats and as wide (float32 for halves): -0 equals +0, NaN is the greatest."""
    values = wide(values)
    if values.dtype.primitive_bitwidth == 64:
        bits = values.to(tl.int64, bitcast=True)
        greatest = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
        ordered = bits ^ ((bits >> 63) & greatest)
    else:
        bits = values.to(tl.int32, bitcast=True)
        greatest = tl.full([], 0x7FFFFFFF, tl.int32)
        ordered = bits ^ ((bits >> 31) & greatest)
    return tl.where(values != values, greatest, tl.where(values == 0, 0, ordered))


@triton.jit
def least_key(like):
    """A key below that of any float, for lanes without an entry."""
    return tl.full([], 1, like.dtype) << (like.dtype.primitive_bitwidth - 1)


@triton.jit
def kth(keys, k):
    """The k-th greatest key; for k = 0 the key of NaN. At least k keys must not be ``least_key``."""
    rounds: tl.constexpr = keys.dtype.primitive_bitwidth - 1
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= k, tl.full([], 0, keys.dtype), least_key(keys))
    bit = tl.full([], 1, keys.dtype) << (rounds - 1)
    for _ in range(rounds):
        found = tl.where(tl.sum((keys >= found + bit).to(tl.int32), 0) >= k, found + bit, found)
        bit = bit >> 1
    return found


@triton.jit
def chosen(keys, k):
    """Mask of the k greatest keys of a row, ties to the lowest index."""
    bound = kth(keys, k)
    above, tied = keys > bound, keys == bound
    room = k - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))


@triton.jit
def budget(budgets, row, k, entries):
    """This row's k."""
    if budgets is not None:
        k = tl.load(budgets + row)
    return tl.minimum(tl.maximum(k, 0), entries).to(tl.int32)


@triton.jit
def _short(scores, budgets, k, mask, entries, BLOCK: tl.constexpr):
    """Select in one row of at most BLOCK entries."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    keys = order_keys(tl.load(scores + row * entries + lane, lane < entries, 0.0))
    keys = tl.where(lane < entries, keys, least_key(keys))
    tl.store(mask + row * entries + lane, chosen(keys, budget(budgets, row, k, entries)).to(tl.uint8), lane < entries)


@triton.jit
def _keys_at(scores, start, entries, BLOCK: tl.constexpr):
    lane = start + tl.arange(0, BLOCK)
    keys = order_keys(tl.load(scores + lane, lane < entries, 0.0))
    return tl.where(lane < entries, keys, least_key(keys))


@triton.jit
def _long(scores, budgets, k, mask, scratch, entries, BLOCK: tl.constexpr):
    """Select in one row longer than BLOCK; the k-th greatest of the lanes' maxima is a lower bound of the k-th key."""
    row = tl.program_id(0).to(tl.int64)
    k = budget(budgets, row, k, entries)
    scores, mask, scratch = scores + row * entries, mask + row * entries, scratch + row * entries
    maxima = _keys_at(scores, 0, entries, BLOCK)
    nothing = least_key(maxima)
    for start in range(BLOCK, entries, BLOCK):
        maxima = tl.maximum(maxima, _keys_at(scores, start, entries, BLOCK))
    bound = tl.where(k <= BLOCK, kth(maxima, tl.minimum(k, BLOCK)), nothing)

    count = tl.full([], 0, tl.int32)
    for start in range(0, entries, BLOCK):
        keys = _keys_at(scores, start, entries, BLOCK)
        hit = ((keys >= bound) & (keys > nothing)).to(tl.int32)
        tl.store(scratch + count + tl.cumsum(hit, 0) - 1, keys, hit > 0)
        count += tl.sum(hit, 0)
    tl.debug_barrier()  # candidates are read by other threads than the writers

    if count <= BLOCK:
        lane = tl.arange(0, BLOCK)
        few = tl.load(scratch + lane, lane < count, nothing)
        bound = kth(few, k)
        above = tl.sum((few > bound).to(tl.int32), 0)
    else:
        bound, above = _kth_in_memory(scratch, k, count, BLOCK)
    room, ties = k - above, tl.full([], 0, tl.int32)
    for start in range(0, entries, BLOCK):
        keys = _keys_at(scores, start, entries, BLOCK)
        tied = keys == bound
        rank = ties + tl.cumsum(tied.to(tl.int32), 0)
        lane = start + tl.arange(0, BLOCK)
        tl.store(mask + lane, ((keys > bound) | (tied & (rank <= room))).to(tl.uint8), lane < entries)
        ties += tl.sum(tied.to(tl.int32), 0)


@triton.jit
def _kth_in_memory(keys, k, count, BLOCK: tl.constexpr):
    """(``kth`` of keys in memory, number of greater keys), for many ties or a large k."""
    rounds: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth - 1
    zero = tl.full([], 0, keys.dtype.element_ty)
    bound = tl.where(_at_least(keys, zero, count, BLOCK) >= k, zero, least_key(zero))
    bit = (zero + 1) << (rounds - 1)
    for _ in range(rounds):
        bound = tl.where(_at_least(keys, bound + bit, count, BLOCK) >= k, bound + bit, bound)
        bit = bit >> 1
    greatest = bound == ~least_key(zero)  # no key is above it, and bound + 1 would overflow
    above = tl.where(greatest, 0, _at_least(keys, tl.where(greatest, bound, bound + 1), count, BLOCK))
    return bound, above


@triton.jit
def _at_least(keys, bound, count, BLOCK: tl.constexpr):
    """Number of keys in memory that are >= bound."""
    total = tl.full([], 0, tl.int32)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        total += tl.sum(((lane < count) & (tl.load(keys + lane, lane < count, 0) >= bound)).to(tl.int32), 0)
    return total


@triton.jit
def _apply(x, p, mask, out, channels, pixels, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(x + at, at < total, 0.0)
    value = wide(source) + wide(tl.load(p + at, at < total, 0.0))
    value = tl.where(value < 0, 0.0, tl.where(value > 1, 1.0, value)).to(source.dtype)
    picked = tl.load(mask + at // (channels * pixels) * pixels + at % pixels, at < total, 0)
    tl.store(out + at, tl.where(picked > 0, value, source), at < total)


def topk_mask(scores: Tensor, rows: Tensor | None, k: int) -> Tensor:
    count, entries = scores.shape
    mask = torch.empty_like(scores, dtype=torch.uint8)
    rows, k = None if rows is None else rows.contiguous(), min(k, entries)
    if entries <= LANES:
        launch(_short, count if entries else 0, scores, scores, rows, k, mask, entries, **lanes(entries))
    else:
        key = torch.int64 if scores.dtype == torch.float64 else torch.int32
        scratch = torch.empty_like(scores, dtype=key)
        launch(_long, count, scores, scores, rows, k, mask, scratch, entries, BLOCK=LANES, warps=16)
    return mask


def lanes(entries: int) -> dict[str, Any]:
    """Launch options of a program that holds a row: its lanes, and warps for at most eight lanes per thread."""
    block = triton.next_power_of_2(entries)
    return {"BLOCK": block, "warps": max(1, min(block // 256, 16))}


def sparse_apply(x: Tensor, p: Tensor, scores: Tensor, rows: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    mask, out = topk_mask(scores, rows, k), torch.empty_like(x)
    launch(_apply, triton.cdiv(x.numel(), 1024), x, x, p, mask, out, *x.shape[1:], x.numel(), BLOCK=1024)
    return out, mask
