# Triton bodies: their pointers have no types, and an annotation would change what is compiled.
# pyright: basic
"""One sPGD update: a single launch if a row's logits fit into registers, otherwise a few."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.sparse import NORM_FLOOR
from .launch import accumulator, launch, number, wide
from .selection import LANES, budget, chosen, lanes, least_key, order_keys, topk_mask

BLOCK = 1024


@triton.jit
def _mask_gradient(gradient, p, logits, at, inside, channels, pixels):
    """The gradient of the loss in the logits: the sum over channels of gradient p, times s (1 - s) of the sigmoid s."""
    decay = tl.exp(-tl.abs(logits))
    total = tl.zeros_like(logits)
    for _ in range(channels):
        total += wide(tl.load(gradient + at, inside, 0.0)) * wide(tl.load(p + at, inside, 0.0))
        gradient, p = gradient + pixels, p + pixels
    slope = decay / ((1.0 + decay) * (1.0 + decay))
    return total * tl.where((logits > 0) & (1.0 + decay == 1.0), 0.0, slope)  # as in the authors' code


@triton.jit
def _moved(logits, for_mask, norm, factor, floor, stabiliser):
    """The new logits; unchanged where the norm is NaN, infinite or tiny."""
    sound = (norm >= number(floor, norm)) & (norm < float("inf"))
    return tl.where(sound, logits + number(factor, norm) / (norm + number(stabiliser, norm)) * for_mask, logits)


@triton.jit
def _write_images(gradient, p, x, to_p, out, old, new, at, inside, alpha, channels, pixels, PROJECTED: tl.constexpr):
    """Move the magnitudes along the gradient's sign within [-1, 1] and the image box; write the perturbed images."""
    for _ in range(channels):
        g = wide(tl.load(gradient + at, inside, 0.0))
        source = tl.load(x + at, inside, 0.0)
        image = wide(source)
        step = tl.where(g > 0, number(alpha, g), tl.where(g < 0, -number(alpha, g), 0.0))  # NaN takes no step
        if PROJECTED:
            step = tl.where(old > 0, step, 0.0)
        value = wide(tl.load(p + at, inside, 0.0)) + step
        value = tl.where(value < -1, -1.0, tl.where(value > 1, 1.0, value))
        value = tl.where(value < -image, -image, value)
        value = tl.where(value > 1 - image, 1 - image, value).to(source.dtype)
        tl.store(to_p + at, value, inside)
        changed = image + wide(value)
        changed = tl.where(changed < 0, 0.0, tl.where(changed > 1, 1.0, changed)).to(source.dtype)
        tl.store(out + at, tl.where(new > 0, changed, source), inside)
        gradient, p, x, to_p, out = gradient + pixels, p + pixels, x + pixels, to_p + pixels, out + pixels


@triton.jit
def _short(
    gradient, p, m, x, mask, budgets, k, to_p, to_m, to_mask, out, changed, channels, pixels,
    alpha: tl.float64, factor: tl.float64, floor: tl.float64, stabiliser: tl.float64,
    PROJECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole update of one image."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < pixels
    pixel, at = row * pixels + lane, row * channels * pixels + lane
    given = tl.load(m + pixel, inside, 0.0)
    logits, old = wide(given), tl.load(mask + pixel, inside, 0)
    for_mask = _mask_gradient(gradient, p, logits, at, inside, channels, pixels)
    norm = tl.sqrt(tl.sum(for_mask * for_mask, 0))
    logits = _moved(logits, for_mask, norm, factor, floor, stabiliser).to(given.dtype)
    tl.store(to_m + pixel, logits, inside)
    keys = order_keys(logits)
    new = chosen(tl.where(inside, keys, least_key(keys)), budget(budgets, row, k, pixels)).to(tl.uint8)
    tl.store(to_mask + pixel, new, inside)
    differs = tl.sum((inside & (new != old)).to(tl.int32), 0) > 0
    tl.store(changed + row, differs)
    _write_images(gradient, p, x, to_p, out, old, new, at, inside, alpha, channels, pixels, PROJECTED)


@triton.jit
def _gradients(gradient, p, m, for_mask, squares, channels, pixels, blocks, BLOCK: tl.constexpr):
    """The mask's gradient and the sum of its squares over a block of one image's pixels."""
    row, part = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    lane = part * BLOCK + tl.arange(0, BLOCK)
    inside = lane < pixels
    logits = wide(tl.load(m + row * pixels + lane, inside, 0.0))
    found = _mask_gradient(gradient, p, logits, row * channels * pixels + lane, inside, channels, pixels)
    tl.store(for_mask + row * pixels + lane, found, inside)
    tl.store(squares + row * blocks + part, tl.sum(tl.where(inside, found * found, 0.0), 0))


@triton.jit
def _logits(
    m, for_mask, squares, to_m, pixels, blocks, factor: tl.float64, floor: tl.float64, stabiliser: tl.float64,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    lane = part * BLOCK + tl.arange(0, BLOCK)
    at, parts = row * pixels + lane, tl.arange(0, PARTS)
    norm = tl.sqrt(tl.sum(tl.load(squares + row * blocks + parts, parts < blocks, 0.0), 0))
    logits = wide(tl.load(m + at, lane < pixels, 0.0))
    moved = _moved(logits, tl.load(for_mask + at, lane < pixels, 0.0), norm, factor, floor, stabiliser)
    tl.store(to_m + at, moved, lane < pixels)


@triton.jit
def _images(
    gradient, p, x, mask, to_mask, to_p, out, channels, pixels, blocks, alpha: tl.float64,
    PROJECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    lane = part * BLOCK + tl.arange(0, BLOCK)
    inside = lane < pixels
    old, new = tl.load(mask + row * pixels + lane, inside, 0), tl.load(to_mask + row * pixels + lane, inside, 0)
    at = row * channels * pixels + lane
    _write_images(gradient, p, x, to_p, out, old, new, at, inside, alpha, channels, pixels, PROJECTED)


def spgd_step(
    gradient: Tensor, p: Tensor, m: Tensor, x: Tensor, mask: Tensor, rows: Tensor | None, k: int,
    alpha: float, beta: float, projected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    count, channels, pixels = x.shape
    to_p, to_m, out = torch.empty_like(p), torch.empty_like(m), torch.empty_like(x)
    numbers = {"factor": beta * math.sqrt(pixels), "floor": NORM_FLOOR, "stabiliser": 1e-10}
    if 0 < pixels <= LANES:
        to_mask, changed = torch.empty_like(mask), x.new_empty(count, dtype=torch.bool)
        rows = None if rows is None else rows.contiguous()
        launch(
            _short, count, x, gradient, p, m, x, mask, rows, min(k, pixels), to_p, to_m, to_mask, out, changed,
            channels, pixels, alpha, **numbers, PROJECTED=projected, **lanes(pixels),
        )  # fmt: skip
        return to_p, to_m, to_mask, out, changed
    blocks, acc = triton.cdiv(pixels, BLOCK), accumulator(x.dtype)
    for_mask, squares = torch.empty_like(m, dtype=acc), x.new_empty(count, blocks, dtype=acc)
    split: dict[str, Any] = {"BLOCK": BLOCK}
    launch(_gradients, count * blocks, x, gradient, p, m, for_mask, squares, channels, pixels, blocks, **split)
    launch(
        _logits, count * blocks, x, m, for_mask, squares, to_m, pixels, blocks, **numbers,
        PARTS=triton.next_power_of_2(blocks), **split,
    )  # fmt: skip
    to_mask = topk_mask(to_m, rows, k)
    launch(
        _images, count * blocks, x, gradient, p, x, mask, to_mask, to_p, out, channels, pixels, blocks, alpha,
        PROJECTED=projected, **split,
    )  # fmt: skip
    return to_p, to_m, to_mask, out, (to_mask != mask).any(1)
