"""Bounds of all margins of a classifier's last layer, without a (K - 1) × D matrix per image."""

from typing import Any

import torch
from torch import Tensor

from . import checks
from .dispatch import backend_for
from .registration import register


def ibp_margins(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Lower bounds of all margins z_y - z_j of the logits z = W x + b: last-layer elision.

    The specification is merged into the last layer. Since |w_y - w_j| <= |w_y| + |w_j|, the result is never below, and
    mostly above, the difference of the logits' own bounds (arXiv 1810.12715). Extra memory, forward and backward, is a
    few times that of the output and the weight; only the ``reference`` backend makes (B, K - 1, D) tensors.

    Args:
        center, radius: (B, D), the last hidden interval; float32 or float64 (on GPU also float16 and bfloat16).
        weight: (K, D); bias: (K,) or None.
        labels: (B,) int64 in [0, K). Values are checked on the CPU; on a GPU only under ``check_values``.
    Returns:
        (B, K - 1), columns j != y in increasing order. Differentiable once in every tensor but labels; a second
        derivative raises.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the argument.
    """
    checks.interval(center, radius)
    if weight.ndim != 2 or center.ndim != 2 or weight.shape[1] != center.shape[1]:
        raise ValueError(f"weight: found shape {tuple(weight.shape)} for center {tuple(center.shape)}; expected (K, D)")
    checks.parameters(center, weight, bias, None, None)
    checks.labels("labels", labels, center)
    return _margins(center, radius, weight, bias, labels)


@torch.library.custom_op("certtrain::ibp_margins", mutates_args=())
def _margins(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    checks.label_values(labels, len(weight))
    center, radius, weight, labels = (t.contiguous() for t in (center, radius, weight, labels))
    return backend_for(center).margins(center, radius, weight, bias, labels)


@torch.library.custom_op("certtrain::ibp_margins_backward", mutates_args=())
def _margins_backward(
    grad: Tensor, center: Tensor, radius: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of center, radius, weight and bias; that of center is a matrix product in torch."""
    grad, center, radius, weight, labels = (t.contiguous() for t in (grad, center, radius, weight, labels))
    for_radius, for_weight = backend_for(center).margins_backward(grad, radius, weight, labels)
    for_logits = _onto_logits(grad, labels, len(weight))
    return for_logits @ weight, for_radius, for_weight.addmm_(for_logits.T, center), for_logits.sum(0)


def _onto_logits(grad: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The gradient (B, K) of the logits W c + b: the row's sum at y, -grad at the other classes."""
    onto = grad.new_zeros(len(grad), classes)
    others = torch.arange(classes - 1, device=labels.device) + (
        torch.arange(classes - 1, device=labels.device) >= labels[:, None]
    )
    onto.scatter_(1, others, -grad)
    return onto.scatter_(1, labels[:, None], grad.sum(1, keepdim=True))


def _fake(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return center.new_empty(len(center), max(len(weight) - 1, 0))


def _fake_backward(
    grad: Tensor, center: Tensor, radius: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = center.shape
    return (
        center.new_empty(shape), center.new_empty(shape), center.new_empty(weight.shape), center.new_empty(len(weight))
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    center, radius, weight, _, labels = inputs
    ctx.save_for_backward(center, radius, weight, labels)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *grads, for_bias = _margins_backward(grad, *ctx.saved_tensors)
    return *grads, for_bias if ctx.needs_input_grad[3] else None, None


register(_margins, fake=_fake, backward=_margins_backward, fake_backward=_fake_backward, save=_save, gradient=_gradient)
