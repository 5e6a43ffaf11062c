"""Pointwise interval ops, ReLU and per-channel affine maps, and batch norm with its statistics."""

from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import backend_for
from .layout import empty, packed
from .registration import formula_is_faster, plain, register


def ibp_relu(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of max(x, 0), exact per entry.

    Args:
        center, radius: any shape; float32 or float64 (on GPU also float16 and bfloat16, computed in float32).
    Returns:
        (center, radius) of the same shape and dtype. At a kink the gradient is torch's (0 at 0); NaN stays NaN.
        A second derivative raises.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the argument.
    """
    checks.interval(center, radius)
    if formula_is_faster(center, center.numel()):
        return plain(reference.ibp_relu, center, radius)
    return _pointwise(center, radius, None, None, True)[:2]


def ibp_affine(
    center: Tensor, radius: Tensor, scale: Tensor, shift: Tensor, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """Interval of ``scale * x + shift`` per channel, for example a folded batch norm, optionally with a ReLU.

    Args:
        center, radius: (B, C, *spatial); float32 or float64 (on GPU also float16 and bfloat16).
        scale, shift: (C,); a negative scale is fine.
        relu: whether max(., 0) follows.
    Returns:
        (center, radius) of the same shape; exact per entry. A second derivative raises.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the argument.
    """
    checks.interval(center, radius)
    count = checks.channels("center", center)
    checks.features("scale", scale, count, center)
    checks.features("shift", shift, count, center)
    if formula_is_faster(center, center.numel()):
        return plain(reference.ibp_affine, center, radius, scale, shift, relu=relu)
    return _pointwise(center, radius, scale, shift, relu)[:2]


def batch_statistics_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the batch's own statistics, which are returned *with their gradients*.

    Args:
        x: (B, C, *spatial), at least two values per channel.
        weight, bias: (C,) or None.
        eps: the stabiliser added to the variance.
    Returns:
        normalised x; mean (C,); biased variance (C,). All three are differentiable in ``x``, as certified training
        needs for its bounds; torch's fused batch norm gives no gradient of the statistics. These are float32 for
        float16 and bfloat16. A second derivative raises.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the argument.
    """
    checks.floating("x", x)
    count = checks.channels("x", x)
    checks.features("weight", weight, count, x, "x")
    checks.features("bias", bias, count, x, "x")
    if not count or x.numel() < 2 * count:
        raise ValueError(f"x: found shape {tuple(x.shape)}; expected at least two values for each channel")
    if formula_is_faster(x, x.numel()):
        return plain(reference.batch_statistics_norm, x, weight, bias, eps)
    return _batch_norm(x, weight, bias, eps)


@torch.library.custom_op("certtrain::ibp_pointwise", mutates_args=())
def _pointwise(
    center: Tensor, radius: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    radius = packed(radius, center)
    return backend_for(center).pointwise(packed(center, center), radius, scale, shift, relu)


@torch.library.custom_op("certtrain::ibp_pointwise_backward", mutates_args=())
def _pointwise_backward(
    grad_center: Tensor, grad_radius: Tensor, state: Tensor, center: Tensor | None, radius: Tensor | None,
    scale: Tensor | None, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = state if center is None else center
    *grads, for_scale, for_shift = backend_for(grad_center).pointwise_backward(
        packed(grad_center, like), packed(grad_radius, like), state,
        None if center is None else packed(center, like), None if radius is None else packed(radius, like),
        scale, sums,
    )  # fmt: skip
    absent = [grad_center.new_empty(0) if g is None else g for g in (for_scale, for_shift)]
    return grads[0], grads[1], absent[0], absent[1]


def _fake_pointwise(
    center: Tensor, radius: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    state = empty(center, torch.uint8) if relu else center.new_empty(0, dtype=torch.uint8)
    return empty(center), empty(center), state


def _fake_pointwise_backward(
    grad_center: Tensor, grad_radius: Tensor, state: Tensor, center: Tensor | None, radius: Tensor | None,
    scale: Tensor | None, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = state if center is None else center
    for_scale = grad_center.new_empty(0) if scale is None else torch.empty_like(scale)
    for_shift = grad_center.new_empty(grad_center.shape[1] if sums else 0)
    return empty(like, grad_center.dtype), empty(like, grad_center.dtype), for_scale, for_shift


def _save_pointwise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    center, radius, scale, _, _ = inputs
    kept = (None, None) if scale is None else (center, radius)  # for a ReLU the state, one byte per entry, is enough
    ctx.save_for_backward(*kept, scale, output[2])


def _pointwise_gradient(ctx: Any, grad_center: Tensor, grad_radius: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    center, radius, scale, state = ctx.saved_tensors
    _, _, of_scale, of_shift, _ = ctx.needs_input_grad
    for_center, for_radius, for_scale, for_shift = _pointwise_backward(
        grad_center, grad_radius, state, center, radius, scale, of_shift
    )
    return for_center, for_radius, for_scale if of_scale else None, for_shift if of_shift else None, None


register(
    _pointwise, fake=_fake_pointwise, backward=_pointwise_backward, fake_backward=_fake_pointwise_backward,
    save=_save_pointwise, gradient=_pointwise_gradient,
)  # fmt: skip


@torch.library.custom_op("certtrain::batch_statistics_norm", mutates_args=())
def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return backend_for(x).batch_norm(packed(x, x), weight, bias, eps)


@torch.library.custom_op("certtrain::batch_statistics_norm_backward", mutates_args=())
def _batch_norm_backward(
    grad_y: Tensor, grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, variance: Tensor,
    weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backend_for(x).batch_norm_backward(
        packed(grad_y, x), grad_mean, grad_variance, packed(x, x), mean, variance, weight, eps
    )


def _statistics(x: Tensor) -> Tensor:
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return x.new_empty(x.shape[1], dtype=dtype)


def _fake_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x), _statistics(x), _statistics(x)


def _fake_batch_norm_backward(
    grad_y: Tensor, grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, variance: Tensor,
    weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _save_batch_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1], output[2])


def _batch_norm_gradient(
    ctx: Any, grad_y: Tensor, grad_mean: Tensor, grad_variance: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight, mean, variance = ctx.saved_tensors
    for_x, for_weight, for_bias = _batch_norm_backward(
        grad_y, grad_mean, grad_variance, x, mean, variance, weight, ctx.eps
    )
    return for_x, for_weight if ctx.needs_input_grad[1] else None, for_bias if ctx.needs_input_grad[2] else None, None


register(
    _batch_norm, fake=_fake_batch_norm, backward=_batch_norm_backward, fake_backward=_fake_batch_norm_backward,
    save=_save_batch_norm, gradient=_batch_norm_gradient,
)  # fmt: skip
