"""Intervals through convolutions, optionally followed by a per-channel affine map and a ReLU.

The two convolutions are the vendor's; bias and ReLU are one fused pass over their outputs, in place. The affine map is
folded into the weights, which are small. |W| is computed where it is used and not saved.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, reference
from .dispatch import backend_for
from .layout import empty, memory_format
from .reference.interval import fold
from .registration import asked, dense, formula_is_faster, plain, register


def ibp_conv2d(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1, groups: int = 1,
    *, scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Interval of a zero-padded convolution, optionally followed by a per-channel affine map and a ReLU.

    Args:
        center, radius: (B, C, H, W), dtypes as in ``ibp_linear``. Padding is exactly 0, with radius 0.
        weight: (K, C / groups, h, w); bias: (K,) or None; stride … groups as in ``torch.nn.functional.conv2d``.
        scale, shift: (K,) or None, applied after the layer (a folded batch norm).
        relu: whether max(., 0) follows.
    Returns:
        (center, radius), each (B, K, H', W'), channels_last where center is; exact per output for an input box up to
        the dtype's rounding. Differentiable once in every tensor; a second derivative raises.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the argument.
    """
    checks.interval(center, radius)
    if center.ndim != 4:
        raise ValueError(f"center: found {center.ndim} dimensions; expected (B, C, H, W)")
    if weight.ndim != 4 or weight.shape[1] * groups != center.shape[1] or len(weight) % groups:
        raise ValueError(
            f"weight: found shape {tuple(weight.shape)} with groups={groups}; "
            f"expected (K, {center.shape[1]} / groups, h, w), K a multiple of groups"
        )
    checks.parameters(center, weight, bias, scale, shift)
    strides, dilations = _pair("stride", stride), _pair("dilation", dilation)
    if isinstance(padding, str):
        center, radius, paddings = _padded(center, radius, weight, padding, strides, dilations)
    else:
        paddings = _pair("padding", padding)
    shape = _output_shape(center, weight, strides, paddings, dilations)
    if min(shape[2:]) < 1:
        found = f"{tuple(weight.shape)} with dilation {dilations}, padding {paddings}"
        raise ValueError(f"weight: found shape {found}; expected a kernel that fits into center, {tuple(center.shape)}")
    if formula_is_faster(center, math.prod(shape)):
        return plain(
            reference.ibp_conv2d, center, radius, weight, bias, strides, paddings, dilations, groups,
            scale=scale, shift=shift, relu=relu,
        )  # fmt: skip
    return _conv2d(center, radius, weight, bias, scale, shift, strides, paddings, dilations, groups, relu)[:2]


def _pair(name: str, value: int | Sequence[int]) -> list[int]:
    values = [value, value] if isinstance(value, int) else list(value) * (2 if len(value) == 1 else 1)
    if len(values) != 2 or min(values) < (name != "padding"):
        raise ValueError(f"{name}: found {value!r}; expected one or two integers, {int(name != 'padding')} or more")
    return values


def _padded(
    center: Tensor, radius: Tensor, weight: Tensor, padding: str, strides: list[int], dilations: list[int]
) -> tuple[Tensor, Tensor, list[int]]:
    """Inputs and symmetric paddings for a named padding; ``same`` may need one more column at the right end."""
    if padding == "valid":
        return center, radius, [0, 0]
    if padding != "same" or strides != [1, 1]:
        raise ValueError(f"padding: found {padding!r} with stride {strides}; expected 'valid', or 'same' with stride 1")
    total = [d * (size - 1) for d, size in zip(dilations, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        odd = [0, total[1] % 2, 0, total[0] % 2]
        center, radius = F.pad(center, odd), F.pad(radius, odd)
    return center, radius, [t // 2 for t in total]


@torch.library.custom_op("certtrain::ibp_conv2d", mutates_args=())
def _conv2d(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    form = memory_format(center)
    weight, bias = fold(weight, bias, scale, shift)
    within = None if relu else bias  # with a ReLU the bias is added in the fused pass
    middle = F.conv2d(center, weight, within, stride, padding, dilation, groups).contiguous(memory_format=form)
    spread = F.conv2d(radius, weight.abs(), None, stride, padding, dilation, groups).contiguous(memory_format=form)
    if not relu:
        return middle, spread, center.new_empty(0, dtype=torch.uint8)
    return backend_for(center).pointwise(middle, spread, None, bias, True, overwrite=True)


@torch.library.custom_op("certtrain::ibp_conv2d_backward", mutates_args=())
def _conv2d_backward(
    grad_center: Tensor, grad_radius: Tensor, state: Tensor, center: Tensor, radius: Tensor, weight: Tensor,
    bias: Tensor | None, scale: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, relu: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of center, radius, weight, bias, scale, shift; empty tensors where ``needs`` is False."""
    form = memory_format(center)
    grad_center, grad_radius = (g.contiguous(memory_format=form) for g in (grad_center, grad_radius))
    folded, _ = fold(weight, None, scale, None)
    for_shift = None
    if relu:
        grad_center, grad_radius, _, for_shift = backend_for(center).pointwise_backward(
            grad_center, grad_radius, state, None, None, None, any(needs[3:])
        )
    elif any(needs[3:]):
        for_shift = grad_center.sum((0, 2, 3))
    of_weight = needs[2] or (needs[4] and scale is not None)
    options = (None, stride, padding, dilation, False, [0, 0], groups)
    grads: list[Tensor | None] = [None] * 6
    backward = torch.ops.aten.convolution_backward
    grads[0], through_center, _ = backward(grad_center, center, folded, *options, [needs[0], of_weight, False])
    grads[1], through_radius, _ = backward(grad_radius, radius, folded.abs(), *options, [needs[1], of_weight, False])
    if of_weight:
        for_folded = through_center.add_(through_radius.mul_(folded.sign()))
        factor = 1 if scale is None else scale.reshape(-1, 1, 1, 1)
        grads[2] = for_folded * factor if needs[2] else None
        if needs[4]:  # the gradient of scale, as a sum over the weights instead of over center and radius
            grads[4] = (for_folded * weight).sum((1, 2, 3))
    if for_shift is not None:
        grads[3] = (for_shift if scale is None else for_shift * scale) if needs[3] else None
        grads[5] = for_shift.clone() if needs[5] else None
        if needs[4] and bias is not None and grads[4] is not None:
            grads[4] += for_shift * bias
    grads = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    like = (center, radius, weight)
    for position, original in enumerate(like):
        if (g := grads[position]) is not None:
            grads[position] = g.contiguous(memory_format=memory_format(original))
    return dense(grads, center)


def _output_shape(
    center: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, ...]:
    sizes = [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(center.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return (len(center), len(weight), *sizes)


def _fake_conv2d(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _output_shape(center, weight, stride, padding, dilation)
    state = empty(center, torch.uint8, shape) if relu else center.new_empty(0, dtype=torch.uint8)
    return empty(center, shape=shape), empty(center, shape=shape), state


def _fake_conv2d_backward(
    grad_center: Tensor, grad_radius: Tensor, state: Tensor, center: Tensor, radius: Tensor, weight: Tensor,
    bias: Tensor | None, scale: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, relu: bool, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    whole = [
        empty(x) if needed else x.new_empty(0) for x, needed in zip((center, radius, weight), needs[:3], strict=True)
    ]
    return *whole, *(weight.new_empty(len(weight) if needed else 0) for needed in needs[3:])


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    center, radius, weight, bias, scale, _, *ctx.options, ctx.relu = inputs
    ctx.save_for_backward(center, radius, weight, bias, scale, output[2])


def _conv2d_gradient(ctx: Any, grad_center: Tensor, grad_radius: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    center, radius, weight, bias, scale, state = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    grads = _conv2d_backward(
        grad_center, grad_radius, state, center, radius, weight, bias, scale, *ctx.options, ctx.relu, needs
    )
    return *asked(grads, needs), *[None] * 5


register(
    _conv2d, fake=_fake_conv2d, backward=_conv2d_backward, fake_backward=_fake_conv2d_backward,
    save=_save_conv2d, gradient=_conv2d_gradient,
)  # fmt: skip
