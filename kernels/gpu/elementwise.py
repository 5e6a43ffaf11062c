# Triton bodies: their pointers have no types, and an annotation would change what is compiled.
# pyright: basic
"""ReLU and per-channel affine maps of intervals in one pass over memory, sums of gradients included."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty
from .launch import ACCUMULATORS, accumulator, elements_of, launch, offsets, place, tiling, wide


@triton.jit
def _forward(
    center, radius, scale, shift, out_center, out_radius, state, elements, channels, inner,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row, channel = place(channels, BLOCK_C, WIDE)
    element = elements_of(row, BLOCK_E)
    inside = (channel < channels) & (element < elements)
    at = offsets(channel, element, channels, inner, FLAT)
    c = wide(tl.load(center + at, inside, 0.0))
    r = wide(tl.load(radius + at, inside, 0.0))
    if scale is not None:
        a = wide(tl.load(scale + channel, channel < channels, 0.0))
        c, r = c * a, r * tl.abs(a)
    if shift is not None:
        c += wide(tl.load(shift + channel, channel < channels, 0.0))
    if state is not None:
        lower, upper = c - r, c + r
        positive = (upper > 0).to(tl.uint8) + (lower > 0).to(tl.uint8)
        tl.store(state + at, positive, inside)
        low, up = tl.where(lower <= 0, 0.0, lower), tl.where(upper <= 0, 0.0, upper)  # NaN is not <= 0 and stays
        c, r = up * 0.5 + low * 0.5, (up - low) * 0.5
    tl.store(out_center + at, c, inside)
    tl.store(out_radius + at, r, inside)


@triton.jit
def _backward(
    grad_center, grad_radius, state, center, radius, scale, for_center, for_radius, for_scale, for_shift,
    elements, channels, inner, tiles_per_part,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients for one part of a block of channels; ``for_scale`` and ``for_shift`` are (parts, channels)."""
    part, channel = place(channels, BLOCK_C, WIDE)
    within = channel < channels
    if scale is not None:
        a = wide(tl.load(scale + channel, within, 0.0))
        sign = tl.where(a > 0, 1.0, tl.where(a < 0, -1.0, a * 0)).to(ACC)
    scale_sum = tl.zeros([BLOCK_C, BLOCK_E], ACC)
    shift_sum = tl.zeros([BLOCK_C, BLOCK_E], ACC)
    for step in range(tiles_per_part):
        element = elements_of(part * tiles_per_part + step, BLOCK_E)
        inside = within & (element < elements)
        at = offsets(channel, element, channels, inner, FLAT)
        g = wide(tl.load(grad_center + at, inside, 0.0))
        h = wide(tl.load(grad_radius + at, inside, 0.0))
        if state is not None:
            positive = tl.load(state + at, inside, 0)
            to_upper = tl.where(positive > 0, (g + h) * 0.5, 0.0)
            to_lower = tl.where(positive > 1, (g - h) * 0.5, 0.0)
            g, h = to_upper + to_lower, to_upper - to_lower
        shift_sum += g
        if scale is not None:
            c = wide(tl.load(center + at, inside, 0.0))
            r = wide(tl.load(radius + at, inside, 0.0))
            scale_sum += g * c + h * r * sign
            g, h = g * a, h * tl.abs(a)
        tl.store(for_center + at, g, inside)
        tl.store(for_radius + at, h, inside)
    if for_shift is not None:
        tl.store(for_shift + part * channels + channel, tl.sum(shift_sum, 1)[:, None], within)
    if scale is not None:
        tl.store(for_scale + part * channels + channel, tl.sum(scale_sum, 1)[:, None], within)


def pointwise(
    center: Tensor, radius: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    out_center, out_radius = (center, radius) if overwrite else (empty(center), empty(center))
    state = empty(center, torch.uint8) if relu else center.new_empty(0, dtype=torch.uint8)
    tiles = tiling(center, scale is not None or shift is not None)
    launch(
        _forward, tiles.columns * tiles.rows, center, center, radius, _plain(scale), _plain(shift),
        out_center, out_radius, state if relu else None, *tiles.numbers, **tiles.constants,
    )  # fmt: skip
    return out_center, out_radius, state


def pointwise_backward(
    grad_center: Tensor, grad_radius: Tensor, state: Tensor, center: Tensor | None, radius: Tensor | None,
    scale: Tensor | None, sums: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    like = grad_center
    for_center, for_radius = empty(like), empty(like)
    tiles = tiling(like, sums or scale is not None)
    parts = tiles.parts if sums or scale is not None else tiles.rows
    shape, acc = (parts, tiles.layout.channels), accumulator(like.dtype)
    for_scale = None if scale is None else like.new_zeros(shape, dtype=acc)
    for_shift = like.new_zeros(shape, dtype=acc) if sums else None
    launch(
        _backward, tiles.columns * parts if like.numel() else 0, like, grad_center, grad_radius,
        state if state.numel() else None, center, radius, _plain(scale), for_center, for_radius, for_scale, for_shift,
        *tiles.numbers, triton.cdiv(tiles.rows, max(parts, 1)), **tiles.constants, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    total_scale, total_shift = (None if t is None else t.sum(0).to(like.dtype) for t in (for_scale, for_shift))
    return for_center, for_radius, total_scale, total_shift


def _plain(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
