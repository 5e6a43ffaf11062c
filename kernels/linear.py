"""Intervals through linear layers, optionally followed by a per-feature affine map and a ReLU.

The two matrix products are the vendor's; affine map and ReLU are one fused pass. |W| is computed where it is used and
not saved. The affine map is applied to the outputs, which are smaller than the weights: CNN7's 512 × 32768 layer holds
97 % of all its parameters.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, reference
from .dispatch import backend_for
from .reference.interval import fold
from .registration import asked, dense, formula_is_faster, plain, register

BLOCK = 1 << 20
"""Entries of |W| held at a time on the CPU. The page faults of a new 64 MB tensor cost more than its arithmetic: with
whole |W| and sign(W), forward + backward of CNN7 took 1.8 times as long at B = 8."""


def ibp_linear(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None = None,
    *, scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Interval of a linear layer, optionally followed by a per-feature affine map and a ReLU.

    Args:
        center, radius: (B, *, D); float32 or float64 (on GPU also float16 and bfloat16, accumulated in float32).
        weight: (H, D); bias: (H,) or None.
        scale, shift: (H,) or None, applied after the layer (a folded batch norm).
        relu: whether max(., 0) follows.
    Returns:
        (center, radius), each (B, *, H); exact per output for an input box up to the dtype's rounding (Gowal et al.,
        arXiv 1810.12715). Differentiable once in every tensor; a second derivative raises.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the argument.
    """
    checks.interval(center, radius)
    if weight.ndim != 2 or not center.ndim or weight.shape[1] != center.shape[-1]:
        width = center.shape[-1] if center.ndim else "D"
        raise ValueError(f"weight: found shape {tuple(weight.shape)}; expected (H, {width})")
    checks.parameters(center, weight, bias, scale, shift)
    outputs = math.prod(center.shape[:-1]) * len(weight)
    if formula_is_faster(center, max(outputs, weight.numel() // 8)):  # the formula makes and keeps |W|
        return plain(reference.ibp_linear, center, radius, weight, bias, scale=scale, shift=shift, relu=relu)
    return _linear(center, radius, weight, bias, scale, shift, relu)[:2]


@torch.library.custom_op("certtrain::ibp_linear", mutates_args=())
def _linear(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(center, radius, state, center and radius before the affine map); the last two are empty without a scale."""
    spread = radius.new_empty(*radius.shape[:-1], len(weight))
    for rows, buffer in _blocks(weight):
        spread[..., rows] = F.linear(radius, torch.abs(weight[rows], out=buffer))
    middle = F.linear(center, weight, bias if not relu or scale is not None else None).contiguous()
    nothing, no_state = center.new_empty(0), center.new_empty(0, dtype=torch.uint8)
    if not relu and scale is None and shift is None:
        return middle, spread, no_state, nothing, center.new_empty(0)
    if scale is None:
        shift = fold(weight, bias, None, shift)[1] if relu else shift
    shape = middle.shape
    ends = backend_for(center).pointwise(_rows(middle), _rows(spread), scale, shift, relu, overwrite=scale is None)
    outputs = ends[0].reshape(shape), ends[1].reshape(shape), ends[2]
    return (*outputs, nothing, center.new_empty(0)) if scale is None else (*outputs, middle, spread)


@torch.library.custom_op("certtrain::ibp_linear_backward", mutates_args=())
def _linear_backward(
    grad_center: Tensor, grad_radius: Tensor, state: Tensor, center: Tensor, radius: Tensor, weight: Tensor,
    scale: Tensor | None, middle: Tensor, spread: Tensor, relu: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of center, radius, weight, bias, scale, shift; empty tensors where ``needs`` is False."""
    from_center, from_radius = _rows(grad_center).contiguous(), _rows(grad_radius).contiguous()
    for_shift = for_scale = None
    if relu or scale is not None:
        before = (None, None) if scale is None else (_rows(middle), _rows(spread))
        from_center, from_radius, for_scale, for_shift = backend_for(center).pointwise_backward(
            from_center, from_radius, state, *before, scale, needs[3] or needs[5]
        )
    elif needs[3] or needs[5]:
        for_shift = from_center.sum(0)
    grads: list[Tensor | None] = [None] * 6
    if needs[0]:
        grads[0] = (from_center @ weight).reshape(center.shape)
    if needs[1]:
        summed = radius.new_zeros(len(from_radius), weight.shape[1])
        for part, buffer in _blocks(weight):
            summed.addmm_(from_radius[:, part], torch.abs(weight[part], out=buffer))
        grads[1] = summed.reshape(radius.shape)
    if needs[2]:
        grads[2] = torch.empty_like(weight, memory_format=torch.contiguous_format)
        flat_center, flat_radius = _rows(center), _rows(radius)
        for part, buffer in _blocks(weight):
            block = grads[2][part]
            torch.mm(from_radius[:, part].T, flat_radius, out=block)
            block.mul_(torch.sign(weight[part], out=buffer))
            block.addmm_(from_center[:, part].T, flat_center)
    if for_shift is not None:
        grads[3] = (for_shift if scale is None else for_shift * scale) if needs[3] else None
        grads[5] = for_shift.clone() if needs[5] else None
    grads[4] = for_scale if needs[4] else None
    return dense(grads, center)


def _rows(x: Tensor) -> Tensor:
    """(B, *, D) → (B·*, D), with explicit rows, which torch cannot infer for D = 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, each with a buffer of its shape, which the next slice reuses."""
    rows, columns = weight.shape
    size = rows if weight.is_cuda else min(rows, BLOCK // max(columns, 1))
    size = max(size, 1)
    buffer = weight.new_empty(size, columns)
    for first in range(0, rows, size):
        part = slice(first, min(first + size, rows))
        yield part, buffer[: part.stop - first]


def _fake_linear(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (*center.shape[:-1], len(weight))
    state = center.new_empty((math.prod(shape[:-1]), len(weight)) if relu else 0, dtype=torch.uint8)
    middle = 0 if scale is None else shape
    return center.new_empty(shape), center.new_empty(shape), state, center.new_empty(middle), center.new_empty(middle)


def _fake_linear_backward(
    grad_center: Tensor, grad_radius: Tensor, state: Tensor, center: Tensor, radius: Tensor, weight: Tensor,
    scale: Tensor | None, middle: Tensor, spread: Tensor, relu: bool, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = (center.shape, radius.shape, weight.shape, weight.shape[:1], weight.shape[:1], weight.shape[:1])
    return tuple(center.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    center, radius, weight, _, scale, _, ctx.relu = inputs
    ctx.save_for_backward(center, radius, weight, scale, *output[2:])
    ctx.set_materialize_grads(True)


def _linear_gradient(ctx: Any, grad_center: Tensor, grad_radius: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    center, radius, weight, scale, state, middle, spread = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    grads = _linear_backward(
        grad_center, grad_radius, state, center, radius, weight, scale, middle, spread, ctx.relu, needs
    )
    return *asked(grads, needs), None


register(
    _linear, fake=_fake_linear, backward=_linear_backward, fake_backward=_fake_linear_backward,
    save=_save_linear, gradient=_linear_gradient,
)  # fmt: skip
