"""The k largest entries of a row, by bisection on integer keys, one bit per round.

Each round counts keys, which vectorises; the number of rounds is bounded for any data, so that no input is slow.
"""

import numpy as np
import torch
from torch import Tensor

from .threads import Array, Maybe, array, jit, run


@jit
def order_keys(row: Array, keys: Array) -> None:
    """Integer keys, as wide as the row's floats and in their order: -0 equals +0, every NaN is the greatest."""
    bits = row.view(keys.dtype)
    bound = np.empty(2, keys.dtype)  # of the keys' own type: wider ones would halve the vector lanes
    bound[0] = np.iinfo(keys.dtype).max
    greatest = bound[0]
    width = np.int32(8 * keys.itemsize - 1)
    for i in range(row.shape[0]):
        ordered = bits[i] ^ ((bits[i] >> width) & greatest)
        keys[i] = greatest if row[i] != row[i] else ordered if row[i] != 0 else 0


@jit
def _count(keys: Array, bound: int) -> np.int32:
    """Number of keys >= bound, counted in 32 bits: a 64-bit count would halve the vector lanes."""
    count = np.int32(0)
    for i in range(keys.shape[0]):
        count = np.int32(count + np.int32(keys[i] >= bound))
    return count


@jit
def _kth(keys: Array, k: int, low: int) -> tuple[int, int]:
    """(threshold, number of keys >= it), given that at least k keys are >= ``low``.

    The threshold is the k-th greatest key, or a lower one with exactly k keys >= it, at which bisection stops early.
    """
    bound = np.empty(1, keys.dtype)  # of the keys' own type: a wider one would halve the vector lanes
    high = keys[0]
    for i in range(keys.shape[0]):
        high = max(high, keys[i])
    bound[0] = low
    at_least = _count(keys, bound[0])
    while low < high and at_least != k:  # at least k keys are >= low, fewer than k are > high
        bound[0] = (low | high) - ((low ^ high) >> 1)  # their mean rounded up, without overflow
        count = _count(keys, bound[0])
        if count >= k:
            low, at_least = bound[0], count
        else:
            high = bound[0] - 1
    return low, at_least


@jit
def _candidates(row: Array, k: int, keys: Array, room: Array, places: Array) -> int:
    """Write candidates for the k greatest keys to ``room``, and their indices to ``places``; return their number.

    Candidates are the keys that reach the k-th greatest of some groups' maxima: at least k keys, and about 2 k of a
    random row.
    """
    groups = (5 * k) // 2
    order_keys(row[:groups], keys[:groups])
    maxima = keys[:groups].copy()
    for start in range(groups, keys.shape[0], groups):
        part = keys[start : start + groups]
        order_keys(row[start : start + groups], part)
        for i in range(part.shape[0]):
            maxima[i] = max(maxima[i], part[i])
    least = np.empty(1, keys.dtype)
    least[0], _ = _kth(maxima, k, maxima.min())
    bound, count = least[0], 0
    for start in range(0, keys.shape[0], 16):
        part = keys[start : start + 16]
        hit = False
        for i in range(part.shape[0]):
            hit |= part[i] >= bound
        if hit:
            for i in range(part.shape[0]):
                room[count], places[count] = part[i], start + i
                count += part[i] >= bound
    return count


@jit
def select(row: Array, k: int, mask: Array, keys: Array, room: Array, places: Array) -> None:
    """Mark the k greatest entries, ties to the lowest index; ``keys``, ``room``, ``places`` are from ``spaces``."""
    k = min(k, row.shape[0])
    if k <= 0:
        mask[:] = 0
        return
    long = row.shape[0] >= 4096 and row.shape[0] >= 16 * k  # shorter rows fit into the first-level cache: use all keys
    if long:
        keys = room[: _candidates(row, k, keys, room, places)]
        mask[:] = 0
    else:
        order_keys(row, keys)
    least, at_least = _kth(keys, k, keys.min())
    bound = np.empty(1, keys.dtype)
    bound[0] = least
    least = bound[0]
    if long:
        for i in range(keys.shape[0]):
            mask[places[i]] = keys[i] >= least
    else:
        for i in range(keys.shape[0]):
            mask[i] = keys[i] >= least
    surplus = at_least - k
    i = keys.shape[0] - 1
    while surplus > 0:  # more ties at the least key than wanted: drop the last ones
        if keys[i] == least:
            mask[places[i] if long else i] = 0
            surplus -= 1
        i -= 1


@jit
def spaces(entries: int, integer: Array) -> tuple[Array, Array, Array]:
    """Buffers for ``select``: keys of a row, candidates (one more entry), and the candidates' indices."""
    return np.empty(entries, integer.dtype), np.empty(entries + 1, integer.dtype), np.empty(entries + 1, np.int32)


@jit
def _masks(first: int, last: int, scores: Array, budgets: Maybe, k: int, mask: Array, integer: Array) -> None:
    """Items are rows."""
    keys, room, places = spaces(scores.shape[1], integer)
    for row in range(first, last):
        select(scores[row], k if budgets is None else budgets[row], mask[row], keys, room, places)


@jit
def _apply(first: int, last: int, x: Array, p: Array, mask: Array, out: Array, zero: float, one: float) -> None:
    """Items are images."""
    for row in range(first, last):
        chosen = mask[row]
        for channel in range(x.shape[1]):
            source, change, to = x[row, channel], p[row, channel], out[row, channel]
            for i in range(chosen.shape[0]):
                value = source[i] + change[i]
                value = zero if value < zero else one if value > one else value
                to[i] = value if chosen[i] else source[i]


def topk_mask(scores: Tensor, rows: Tensor | None, k: int) -> Tensor:
    mask = torch.empty(scores.shape, dtype=torch.uint8)
    inputs = array(scores, *scores.shape), budgets_of(rows), k
    run(_masks, len(scores), scores.numel() * 8, *inputs, mask.numpy(), integer_like(scores))
    return mask


def sparse_apply(x: Tensor, p: Tensor, scores: Tensor, rows: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    mask, out = topk_mask(scores, rows, k), torch.empty_like(x)
    number = np.float32 if x.dtype == torch.float32 else np.float64
    arrays = [array(t, *t.shape) for t in (x, p, mask, out)]
    run(_apply, len(x), x.numel() * 4, *arrays, number(0), number(1))
    return out, mask


def budgets_of(rows: Tensor | None) -> Array | None:
    """One k per row as an array, or None."""
    return None if rows is None else rows.contiguous().numpy()


def integer_like(x: Tensor) -> Array:
    """An empty array of the integer type as wide as x's floats."""
    return np.empty(0, np.int32 if x.dtype == torch.float32 else np.int64)
