"""Batch norm with its statistics, one channel at a time, so that later passes find the data in cache."""

import numpy as np
import torch
from torch import Tensor

from ..layout import empty, layout_of
from .threads import Array, array, jit, run


@jit(reassociate=True)
def _planes(
    first: int, last: int, x: Array, weight: Array, bias: Array, eps: float, y: Array, mean: Array, variance: Array,
    zero: float,
) -> None:  # fmt: skip
    """Arrays (outer, channels, inner); items are channels. A plane is summed in the dtype, planes in float64."""
    count = x.shape[0] * x.shape[2]
    for channel in range(first, last):
        total = 0.0
        for o in range(x.shape[0]):
            part, row = zero, x[o, channel]
            for i in range(row.shape[0]):
                part += row[i]
            total += part
        center = zero + total / count
        total = 0.0
        for o in range(x.shape[0]):
            part, row = zero, x[o, channel]
            for i in range(row.shape[0]):
                part += (row[i] - center) * (row[i] - center)
            total += part
        mean[channel], variance[channel] = center, total / count
        factor = zero + weight[channel] / np.sqrt(total / count + eps)
        constant = bias[channel]
        for o in range(x.shape[0]):
            row, out = x[o, channel], y[o, channel]
            for i in range(row.shape[0]):
                out[i] = (row[i] - center) * factor + constant


@jit
def _columns(
    first: int, last: int, x: Array, weight: Array, bias: Array, eps: float, y: Array, mean: Array, variance: Array,
    zero: float,
) -> None:  # fmt: skip
    """Arrays (outer, channels); items are channels."""
    count = x.shape[0]
    total = np.zeros(last - first)
    for o in range(count):
        row = x[o, first:last]
        for i in range(row.shape[0]):
            total[i] += row[i]
    center = mean[first:last]
    for i in range(total.shape[0]):
        center[i] = total[i] / count
        total[i] = 0
    for o in range(count):
        row = x[o, first:last]
        for i in range(row.shape[0]):
            total[i] += (row[i] - center[i]) * (row[i] - center[i])
    factor, constant = np.empty_like(x[0, first:last]), bias[first:last]
    for i in range(total.shape[0]):
        variance[first + i] = total[i] / count
        factor[i] = weight[first + i] / np.sqrt(total[i] / count + eps)
    for o in range(count):
        row, out = x[o, first:last], y[o, first:last]
        for i in range(row.shape[0]):
            out[i] = (row[i] - center[i]) * factor[i] + constant[i]


@jit(reassociate=True)
def _planes_backward(first: int, last: int, x: Array, grad: Array, mean: Array, sums: Array, zero: float) -> None:
    """``sums`` (2, channels): of grad, and of grad times the centered x."""
    for channel in range(first, last):
        plain, weighted, center = 0.0, 0.0, mean[channel]
        for o in range(x.shape[0]):
            part, other, row, g = zero, zero, x[o, channel], grad[o, channel]
            for i in range(row.shape[0]):
                part += g[i]
                other += g[i] * (row[i] - center)
            plain += part
            weighted += other
        sums[0, channel], sums[1, channel] = plain, weighted


@jit
def _columns_backward(first: int, last: int, x: Array, grad: Array, mean: Array, sums: Array, zero: float) -> None:
    center = mean[first:last]
    plain, weighted = sums[0, first:last], sums[1, first:last]
    for o in range(x.shape[0]):
        row, g = x[o, first:last], grad[o, first:last]
        for i in range(row.shape[0]):
            plain[i] += g[i]
            weighted[i] += g[i] * (row[i] - center[i])


@jit
def _planes_combined(
    first: int, last: int, x: Array, grad: Array, mean: Array, onto_grad: Array, onto_x: Array, constant: Array,
    out: Array,
) -> None:  # fmt: skip
    for o in range(x.shape[0]):
        for channel in range(first, last):
            a, b, c, center = onto_grad[channel], onto_x[channel], constant[channel], mean[channel]
            row, g, to = x[o, channel], grad[o, channel], out[o, channel]
            for i in range(row.shape[0]):
                to[i] = a * g[i] + b * (row[i] - center) + c


@jit
def _columns_combined(
    first: int, last: int, x: Array, grad: Array, mean: Array, onto_grad: Array, onto_x: Array, constant: Array,
    out: Array,
) -> None:  # fmt: skip
    a, b, c, center = onto_grad[first:last], onto_x[first:last], constant[first:last], mean[first:last]
    for o in range(x.shape[0]):
        row, g, to = x[o, first:last], grad[o, first:last], out[o, first:last]
        for i in range(row.shape[0]):
            to[i] = a[i] * g[i] + b[i] * (row[i] - center[i]) + c[i]


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, variance = empty(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    shape, by_column = _shape(x)
    vectors = (
        (x.new_full(x.shape[1:2], fill) if given is None else given.detach().contiguous()).numpy()
        for given, fill in ((weight, 1), (bias, 0))
    )
    run(
        _columns if by_column else _planes, shape[1], x.numel() * 4,
        array(x, *shape), *vectors, eps, array(y, *shape), mean.numpy(), variance.numpy(), _zero(x),
    )  # fmt: skip
    return y, mean, variance


def batch_norm_backward(
    grad_y: Tensor, grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, variance: Tensor,
    weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape, by_column = _shape(x)
    values, grads, center = array(x, *shape), array(grad_y, *shape), mean.numpy()
    sums = torch.zeros(2, x.shape[1], dtype=torch.float64)
    kernel = _columns_backward if by_column else _planes_backward
    run(kernel, shape[1], x.numel() * 4, values, grads, center, sums.numpy(), _zero(x))
    count = x.numel() // x.shape[1]
    inverse = torch.rsqrt(variance.double() + eps)
    grad_bias, grad_weight = sums[0], sums[1] * inverse
    factor = inverse if weight is None else inverse * weight
    onto_x = (2 * grad_variance - factor * inverse * grad_weight) / count
    constant = (grad_mean - factor * grad_bias) / count
    grad_x = empty(x)
    run(
        _columns_combined if by_column else _planes_combined, shape[1], x.numel() * 4, values, grads, center,
        *(t.to(x.dtype).numpy() for t in (factor, onto_x, constant)), array(grad_x, *shape),
    )  # fmt: skip
    return grad_x, grad_weight.to(x.dtype), grad_bias.to(x.dtype)


def _shape(x: Tensor) -> tuple[tuple[int, ...], bool]:
    layout = layout_of(x)
    return (tuple(layout), False) if layout.inner > 1 else ((layout.outer, layout.channels), True)


def _zero(x: Tensor) -> np.floating:
    return np.float32(0) if x.dtype == torch.float32 else np.float64(0)
