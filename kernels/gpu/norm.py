# Triton bodies: their pointers have no types, and an annotation would change what is compiled.
# pyright: basic
"""Batch norm with its statistics: forward and backward each take one pass for sums and one for the result."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty
from .launch import (
    ACCUMULATORS,
    MOST_PARTS,
    Tiling,
    accumulator,
    elements_of,
    launch,
    number,
    offsets,
    place,
    tiling,
    wide,
)


@triton.jit
def _statistics(
    x, means, squares, elements, channels, inner, tiles_per_part,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of one part, tile by tile (Chan et al.), accurate also for large means."""
    part, channel = place(channels, BLOCK_C, WIDE)
    within = channel < channels
    mean, square = tl.zeros([BLOCK_C, 1], ACC), tl.zeros([BLOCK_C, 1], ACC)
    before = tl.zeros([1], ACC)
    for step in range(tiles_per_part):
        element = elements_of(part * tiles_per_part + step, BLOCK_E)
        inside = within & (element < elements)
        count = tl.minimum(elements - (part * tiles_per_part + step) * BLOCK_E, BLOCK_E).to(ACC)
        if count > 0:
            values = tl.load(x + offsets(channel, element, channels, inner, FLAT), inside, 0.0).to(ACC)
            own = tl.sum(values, 1)[:, None] / count
            deviation = tl.where(inside, values - own, 0.0)
            change, total = own - mean, before + count
            square += tl.sum(deviation * deviation, 1)[:, None] + change * change * (before * count / total)
            mean += change * (count / total)
            before = total
    tl.store(means + part * channels + channel, mean, within)
    tl.store(squares + part * channels + channel, square, within)


@triton.jit
def _combine(
    means, squares, mean, variance, elements, channels, parts, tiles_per_part,
    PARTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, PARTS)[:, None]
    inside = (part < parts) & (channel < channels)[None, :]
    m = tl.load(means + part * channels + channel, inside, 0.0)
    s = tl.load(squares + part * channels + channel, inside, 0.0)
    last = tl.minimum(elements - part * tiles_per_part * BLOCK_E, tiles_per_part * BLOCK_E)
    share = tl.maximum(last, 0).to(m.dtype) / elements.to(m.dtype)
    center = tl.sum(m * share, 0)
    spread = tl.sum(s / elements.to(m.dtype) + tl.where(inside, (m - center) * (m - center), 0.0) * share, 0)
    tl.store(mean + channel, center, channel < channels)
    tl.store(variance + channel, spread, channel < channels)


@triton.jit
def _normalise(
    x, mean, variance, weight, bias, y, elements, channels, inner, eps: tl.float64,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row, channel = place(channels, BLOCK_C, WIDE)
    element = elements_of(row, BLOCK_E)
    within = channel < channels
    inside = within & (element < elements)
    at = offsets(channel, element, channels, inner, FLAT)
    center, spread = tl.load(mean + channel, within, 0.0), tl.load(variance + channel, within, 1.0)
    factor = 1.0 / tl.sqrt(spread + number(eps, spread))
    if weight is not None:
        factor *= wide(tl.load(weight + channel, within, 0.0))
    out = (wide(tl.load(x + at, inside, 0.0)) - center) * factor
    if bias is not None:
        out += wide(tl.load(bias + channel, within, 0.0))
    tl.store(y + at, out, inside)


@triton.jit
def _sums(
    x, grad, mean, plain, weighted, elements, channels, inner, tiles_per_part,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of grad, and of grad times the centered x, over one part."""
    part, channel = place(channels, BLOCK_C, WIDE)
    within = channel < channels
    center = tl.load(mean + channel, within, 0.0)
    first, second = tl.zeros([BLOCK_C, BLOCK_E], ACC), tl.zeros([BLOCK_C, BLOCK_E], ACC)
    for step in range(tiles_per_part):
        element = elements_of(part * tiles_per_part + step, BLOCK_E)
        inside = within & (element < elements)
        at = offsets(channel, element, channels, inner, FLAT)
        g = wide(tl.load(grad + at, inside, 0.0))
        first += g
        second += g * (wide(tl.load(x + at, inside, 0.0)) - center)
    tl.store(plain + part * channels + channel, tl.sum(first, 1)[:, None], within)
    tl.store(weighted + part * channels + channel, tl.sum(second, 1)[:, None], within)


@triton.jit
def _coefficients(
    plain, weighted, variance, weight, grad_mean, grad_variance, factor, onto_x, constant, grad_weight, grad_bias,
    elements, channels, parts, eps: tl.float64, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = channel < channels
    part = tl.arange(0, PARTS)[:, None]
    inside = (part < parts) & within[None, :]
    for_bias = tl.sum(tl.load(plain + part * channels + channel, inside, 0.0), 0)
    spread = tl.load(variance + channel, within, 1.0)
    inverse = 1.0 / tl.sqrt(spread + number(eps, spread))
    for_weight = tl.sum(tl.load(weighted + part * channels + channel, inside, 0.0), 0) * inverse
    a = inverse
    if weight is not None:
        a *= wide(tl.load(weight + channel, within, 0.0))
    count = elements.to(inverse.dtype)
    b = (2 * wide(tl.load(grad_variance + channel, within, 0.0)) - a * inverse * for_weight) / count
    c = (wide(tl.load(grad_mean + channel, within, 0.0)) - a * for_bias) / count
    tl.store(factor + channel, a, within)
    tl.store(onto_x + channel, b, within)
    tl.store(constant + channel, c, within)
    tl.store(grad_weight + channel, for_weight, within)
    tl.store(grad_bias + channel, for_bias, within)


@triton.jit
def _combined(
    x, grad, mean, factor, onto_x, constant, out, elements, channels, inner,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row, channel = place(channels, BLOCK_C, WIDE)
    element = elements_of(row, BLOCK_E)
    within = channel < channels
    inside = within & (element < elements)
    at = offsets(channel, element, channels, inner, FLAT)
    g, centered = wide(tl.load(grad + at, inside, 0.0)), wide(tl.load(x + at, inside, 0.0))
    centered -= tl.load(mean + channel, within, 0.0)
    a, b = tl.load(factor + channel, within, 0.0), tl.load(onto_x + channel, within, 0.0)
    tl.store(out + at, a * g + b * centered + tl.load(constant + channel, within, 0.0), inside)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    tiles, acc = tiling(x, True), accumulator(x.dtype)
    y, mean, variance = empty(x), x.new_empty(x.shape[1], dtype=acc), x.new_empty(x.shape[1], dtype=acc)
    means, squares = _partial(x, tiles, acc)
    tiles_per_part = triton.cdiv(tiles.rows, tiles.parts)
    launch(
        _statistics, tiles.columns * tiles.parts, x, x, means, squares, *tiles.numbers, tiles_per_part,
        **tiles.constants, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    launch(
        _combine, triton.cdiv(x.shape[1], 16), x, means, squares, mean, variance, *tiles.numbers[:2], tiles.parts,
        tiles_per_part, **_reduction(tiles), BLOCK_E=tiles.block_e,
    )  # fmt: skip
    launch(
        _normalise, tiles.columns * tiles.rows, x, x, mean, variance, *(_plain(t) for t in (weight, bias)), y,
        *tiles.numbers, eps, **tiles.constants,
    )  # fmt: skip
    return y, mean, variance


def batch_norm_backward(
    grad_y: Tensor, grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, variance: Tensor,
    weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tiles, acc = tiling(x, True), accumulator(x.dtype)
    plain, weighted = _partial(x, tiles, acc)
    launch(
        _sums, tiles.columns * tiles.parts, x, x, grad_y, mean, plain, weighted, *tiles.numbers,
        triton.cdiv(tiles.rows, tiles.parts), **tiles.constants, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    factor, onto_x, constant = x.new_empty(3, x.shape[1], dtype=acc)
    grad_weight, grad_bias = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    launch(
        _coefficients, triton.cdiv(x.shape[1], 16), x, plain, weighted, variance, _plain(weight),
        grad_mean.contiguous(), grad_variance.contiguous(), factor, onto_x, constant, grad_weight, grad_bias,
        *tiles.numbers[:2], tiles.parts, eps, **_reduction(tiles),
    )  # fmt: skip
    grad_x = empty(x)
    launch(
        _combined, tiles.columns * tiles.rows, x, x, grad_y, mean, factor, onto_x, constant, grad_x,
        *tiles.numbers, **tiles.constants,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def _partial(x: Tensor, tiles: Tiling, dtype: torch.dtype) -> Tensor:
    return x.new_empty(2, tiles.parts, x.shape[1], dtype=dtype)


def _reduction(tiles: Tiling) -> dict[str, Any]:
    return {"PARTS": min(triton.next_power_of_2(tiles.parts), MOST_PARTS), "BLOCK_C": 16}


def _plain(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
