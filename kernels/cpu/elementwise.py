"""ReLU and per-channel affine maps of intervals in one pass, with channels divided among threads."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..layout import empty, layout_of
from .threads import Array, Maybe, array, jit, run

Kernel: TypeAlias = Callable[..., Any]


@jit(inline=True)
def _through_relu(center: float, radius: float, half: float, zero: float) -> tuple[float, float, np.uint8]:
    lower, upper = center - radius, center + radius
    state = np.uint8(upper > zero) + np.uint8(lower > zero)
    low = zero if lower <= zero else lower  # NaN is not <= 0 and stays
    up = zero if upper <= zero else upper
    return up * half + low * half, (up - low) * half, state


@jit(inline=True)
def _back_through_relu(
    grad_center: float, grad_radius: float, state: int, half: float, zero: float
) -> tuple[float, float]:
    to_upper = (grad_center + grad_radius) * half if state > 0 else zero
    to_lower = (grad_center - grad_radius) * half if state > 1 else zero
    return to_upper + to_lower, to_upper - to_lower


@jit
def _planes(
    first: int, last: int, center: Array, radius: Array, scale: Maybe, shift: Maybe, out_center: Maybe,
    out_radius: Maybe, state: Maybe, half: float, zero: float,
) -> None:  # fmt: skip
    """Arrays (outer, channels, inner); items are channels. Without outputs the inputs are overwritten.

    Passing the inputs as outputs would fail a vectorised loop's check for overlap and take five times as long.
    """
    for o in range(center.shape[0]):
        for channel in range(first, last):
            c, r = center[o, channel], radius[o, channel]
            to_c, to_r = (c, r) if out_center is None else (out_center[o, channel], out_radius[o, channel])
            a = half + half if scale is None else scale[channel]
            b = zero if shift is None else shift[channel]
            if state is None:
                for i in range(c.shape[0]):
                    to_c[i], to_r[i] = c[i] * a + b, r[i] * abs(a)
            else:
                s = state[o, channel]
                for i in range(c.shape[0]):
                    to_c[i], to_r[i], s[i] = _through_relu(c[i] * a + b, r[i] * abs(a), half, zero)


@jit
def _columns(
    first: int, last: int, center: Array, radius: Array, scale: Maybe, shift: Maybe, out_center: Maybe,
    out_radius: Maybe, state: Maybe, half: float, zero: float,
) -> None:  # fmt: skip
    """Arrays (outer, channels); items are channels."""
    for o in range(center.shape[0]):
        c, r = center[o, first:last], radius[o, first:last]
        to_c, to_r = (c, r) if out_center is None else (out_center[o, first:last], out_radius[o, first:last])
        if scale is not None:
            a = scale[first:last]
            for i in range(c.shape[0]):
                to_c[i], to_r[i] = c[i] * a[i], r[i] * abs(a[i])
            c, r = to_c, to_r
        if shift is not None:
            b = shift[first:last]
            for i in range(c.shape[0]):
                to_c[i], to_r[i] = c[i] + b[i], r[i]
            c, r = to_c, to_r
        if state is not None:
            s = state[o, first:last]
            for i in range(c.shape[0]):
                to_c[i], to_r[i], s[i] = _through_relu(c[i], r[i], half, zero)


@jit(reassociate=True)
def _planes_backward(
    first: int, last: int, grad_center: Array, grad_radius: Array, state: Maybe, center: Maybe, radius: Maybe,
    scale: Maybe, for_center: Array, for_radius: Array, for_scale: Maybe, for_shift: Maybe, half: float, zero: float,
) -> None:  # fmt: skip
    for channel in range(first, last):
        scale_sum, shift_sum = 0.0, 0.0
        a = half + half if scale is None else scale[channel]
        for o in range(grad_center.shape[0]):
            g, h = grad_center[o, channel], grad_radius[o, channel]
            to_c, to_r = for_center[o, channel], for_radius[o, channel]
            if state is not None:
                s = state[o, channel]
                for i in range(g.shape[0]):
                    to_c[i], to_r[i] = _back_through_relu(g[i], h[i], s[i], half, zero)
                g, h = to_c, to_r
            if for_shift is not None:
                total = zero
                for i in range(g.shape[0]):
                    total += g[i]
                shift_sum += total
            if scale is not None:
                c, r = center[o, channel], radius[o, channel]
                sign = zero + np.sign(a)
                total = zero
                for i in range(g.shape[0]):
                    total += g[i] * c[i] + h[i] * r[i] * sign
                scale_sum += total
                for i in range(g.shape[0]):
                    to_c[i], to_r[i] = g[i] * a, h[i] * abs(a)
        if for_shift is not None:
            for_shift[channel] = shift_sum
        if scale is not None:
            for_scale[channel] = scale_sum


@jit
def _columns_backward(
    first: int, last: int, grad_center: Array, grad_radius: Array, state: Maybe, center: Maybe, radius: Maybe,
    scale: Maybe, for_center: Array, for_radius: Array, for_scale: Maybe, for_shift: Maybe, half: float, zero: float,
) -> None:  # fmt: skip
    for o in range(grad_center.shape[0]):
        g, h = grad_center[o, first:last], grad_radius[o, first:last]
        to_c, to_r = for_center[o, first:last], for_radius[o, first:last]
        if state is not None:
            s = state[o, first:last]
            for i in range(g.shape[0]):
                to_c[i], to_r[i] = _back_through_relu(g[i], h[i], s[i], half, zero)
            g, h = to_c, to_r
        if for_shift is not None:
            total = for_shift[first:last]
            for i in range(g.shape[0]):
                total[i] += g[i]
        if scale is not None:
            a, c, r = scale[first:last], center[o, first:last], radius[o, first:last]
            total = for_scale[first:last]
            for i in range(g.shape[0]):
                total[i] += g[i] * c[i] + h[i] * r[i] * np.sign(a[i])
            for i in range(g.shape[0]):
                to_c[i], to_r[i] = g[i] * a[i], h[i] * abs(a[i])


def pointwise(
    center: Tensor, radius: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    out_center, out_radius = (center, radius) if overwrite else (empty(center), empty(center))
    state = empty(center, torch.uint8) if relu else center.new_empty(0, dtype=torch.uint8)
    kernel, shape = _view(center, scale is not None or shift is not None, _planes, _columns)
    arrays = [_array(t, shape) for t in (center, radius)]
    vectors = [_vector(scale), _vector(shift)]
    outputs = [None if overwrite else _array(t, shape) for t in (out_center, out_radius)]
    outputs.append(_array(state, shape) if relu else None)
    run(kernel, shape[1], center.numel() * 4, *arrays, *vectors, *outputs, *_constants(center))
    return out_center, out_radius, state


def pointwise_backward(
    grad_center: Tensor, grad_radius: Tensor, state: Tensor, center: Tensor | None, radius: Tensor | None,
    scale: Tensor | None, sums: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    like = grad_center
    relu = state.numel() > 0
    for_center, for_radius = empty(like), empty(like)
    kernel, shape = _view(like, sums or scale is not None, _planes_backward, _columns_backward)
    wide = torch.float64  # sums over a batch
    for_scale = None if scale is None else like.new_zeros(like.shape[1], dtype=wide)
    for_shift = like.new_zeros(like.shape[1], dtype=wide) if sums else None
    run(
        kernel, shape[1], like.numel() * 4, _array(grad_center, shape), _array(grad_radius, shape),
        _array(state, shape) if relu else None,
        None if center is None else _array(center, shape), None if radius is None else _array(radius, shape),
        _vector(scale),
        _array(for_center, shape), _array(for_radius, shape),
        *(None if t is None else t.numpy() for t in (for_scale, for_shift)), *_constants(like),
    )  # fmt: skip
    total_scale, total_shift = (None if t is None else t.to(like.dtype) for t in (for_scale, for_shift))
    return for_center, for_radius, total_scale, total_shift


def _view(like: Tensor, by_channel: bool, planes: Kernel, columns: Kernel) -> tuple[Kernel, tuple[int, ...]]:
    """The kernel and the shape for a packed tensor; without channels, one row."""
    if not by_channel:
        return columns, (1, like.numel())
    layout = layout_of(like)
    if layout.inner == 1:
        return columns, (layout.outer, layout.channels)
    return planes, tuple(layout)


def _array(tensor: Tensor, shape: tuple[int, ...]) -> Array:
    return array(tensor, *shape)


def _vector(values: Tensor | None) -> Array | None:
    return None if values is None else values.detach().contiguous().numpy()


def _constants(like: Tensor) -> tuple[np.floating, np.floating]:
    number = np.float32 if like.dtype == torch.float32 else np.float64
    return number(0.5), number(0.0)
