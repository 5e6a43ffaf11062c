"""One sPGD update, image by image, so that an image's tensors stay in cache."""

import math

import numpy as np
import torch
from torch import Tensor

from ..reference.sparse import NORM_FLOOR
from .selection import budgets_of, integer_like, select, spaces
from .threads import Array, Maybe, array, jit, run


@jit
def _slopes32(logits: Array, slopes: Array, powers: Array) -> None:
    """s (1 - s) of the sigmoid s of float32 logits, within a few ulp; NaN for NaN; 0 where s rounds to 1, as in the
    authors' code.

    Computed from exp(-|m|) by bits of 2^n and Cephes' polynomial on [-ln 2 / 2, ln 2 / 2], since the library's exp does
    not vectorise.
    """
    for i in range(logits.shape[0]):
        x = max(-abs(logits[i]), np.float32(-87.0))
        n = np.float32(np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5)))
        powers[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
        f = x - n * np.float32(0.693359375)
        f = f - n * np.float32(-2.12194440e-4)
        y = np.float32(1.9875691500e-4)
        y = y * f + np.float32(1.3981999507e-3)
        y = y * f + np.float32(8.3334519073e-3)
        y = y * f + np.float32(4.1665795894e-2)
        y = y * f + np.float32(1.6666665459e-1)
        y = y * f + np.float32(5.0000001201e-1)
        slopes[i] = y * f * f + f + np.float32(1)
    scales = powers.view(np.float32)
    for i in range(logits.shape[0]):
        e = slopes[i] * scales[i]
        slope = e / ((np.float32(1) + e) * (np.float32(1) + e))
        slope = np.float32(0) if np.float32(1) + e == np.float32(1) and logits[i] > np.float32(0) else slope
        slopes[i] = slope if logits[i] == logits[i] else logits[i]


@jit
def _slopes64(logits: Array, slopes: Array) -> None:
    """``_slopes32`` for float64 logits."""
    for i in range(logits.shape[0]):
        e = math.exp(-abs(logits[i]))
        slopes[i] = 0 if 1 + e == 1 and logits[i] > 0 else e / ((1 + e) * (1 + e))


@jit(reassociate=True)
def _squares(values: Array, zero: float) -> float:
    total = zero
    for i in range(values.shape[0]):
        total += values[i] * values[i]
    return total


@jit
def _moved(
    gradient: Array, p: Array, m: Array, x: Array, mask: Array, alpha: float, factor: float, projected: bool,
    to_p: Array, to_m: Array, weights: Array, zero: float, one: float, floor: float, stabiliser: float,
) -> None:  # fmt: skip
    """New magnitudes and logits of one image; ``weights`` holds the slopes, then the gradient of the mask."""
    pixels = m.shape[0]
    for i in range(pixels):
        to_m[i] = zero
    for channel in range(x.shape[0]):
        g, old = gradient[channel], p[channel]
        for i in range(pixels):
            to_m[i] += g[i] * old[i]
    for i in range(pixels):
        weights[i] = weights[i] * to_m[i]
    norm = zero + np.sqrt(_squares(weights, zero))
    if norm >= floor and norm < np.inf:
        step = zero + factor / (norm + stabiliser)
        for i in range(pixels):
            to_m[i] = m[i] + step * weights[i]
    else:
        to_m[:] = m
    for channel in range(x.shape[0]):
        g, old, image, to = gradient[channel], p[channel], x[channel], to_p[channel]
        for i in range(pixels):
            step = alpha if g[i] > zero else -alpha if g[i] < zero else zero
            step = step if mask[i] or not projected else zero
            value = old[i] + step
            value = -one if value < -one else one if value > one else value
            value = -image[i] if value < -image[i] else value
            to[i] = one - image[i] if value > one - image[i] else value


@jit
def _finished(x: Array, p: Array, old: Array, mask: Array, out: Array, zero: float, one: float) -> bool:
    """Write the perturbed image to ``out``; return whether the mask changed."""
    changed = False
    for i in range(mask.shape[0]):
        changed |= mask[i] != old[i]
    for channel in range(x.shape[0]):
        image, change, to = x[channel], p[channel], out[channel]
        for i in range(mask.shape[0]):
            value = image[i] + change[i]
            value = zero if value < zero else one if value > one else value
            to[i] = value if mask[i] else image[i]
    return changed


@jit
def _steps(
    first: int, last: int, gradient: Array, p: Array, m: Array, x: Array, mask: Array, budgets: Maybe, k: int,
    alpha: float, factor: float, projected: bool, to_p: Array, to_m: Array, to_mask: Array, out: Array, changed: Array,
    zero: float, one: float, floor: float, stabiliser: float, integer: Array,
) -> None:  # fmt: skip
    """Items are images."""
    keys, room, places = spaces(m.shape[1], integer)
    weights = np.empty(m.shape[1], m.dtype)
    for row in range(first, last):
        if keys.itemsize == 4:
            _slopes32(m[row], weights, keys)
        else:
            _slopes64(m[row], weights)
        _moved(
            gradient[row], p[row], m[row], x[row], mask[row], alpha, factor, projected, to_p[row], to_m[row],
            weights, zero, one, floor, stabiliser,
        )  # fmt: skip
        select(to_m[row], k if budgets is None else budgets[row], to_mask[row], keys, room, places)
        changed[row] = _finished(x[row], to_p[row], mask[row], to_mask[row], out[row], zero, one)


def spgd_step(
    gradient: Tensor, p: Tensor, m: Tensor, x: Tensor, mask: Tensor, rows: Tensor | None, k: int,
    alpha: float, beta: float, projected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    single = x.dtype == torch.float32
    number = np.float32 if single else np.float64
    outputs = (torch.empty_like(p), torch.empty_like(m), torch.empty_like(mask), torch.empty_like(x))
    changed = torch.empty(len(x), dtype=torch.bool)
    factor = number(beta * math.sqrt(m.shape[1]))
    run(
        _steps, len(x), x.numel() * 32,
        *(array(t, *t.shape) for t in (gradient, p, m, x, mask)), budgets_of(rows), k,
        number(alpha), factor, projected, *(array(t, *t.shape) for t in outputs), changed.numpy(),
        number(0), number(1), number(NORM_FLOOR), number(1e-10), integer_like(m),
    )  # fmt: skip
    return *outputs, changed
