"""The functions of every backend, here in plain torch, with gradients by hand.

Arguments are checked, on one device and of one dtype. Intervals are packed (``layout.py``); relaxations are (B, R, N);
images are (B, C, N) and scores (B, N), contiguous. Results are new tensors unless ``overwrite`` is set. A state is one
byte per entry: how many of the interval's two ends are positive.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import packed
from . import cutting, interval, relaxation, sparse


def pointwise(
    center: Tensor, radius: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(center, radius, state) of max(scale x + shift, 0), any of the three steps optional; empty state without ReLU."""
    center, radius = center.clone(), radius.clone()
    if scale is not None:
        scale = interval.per_channel(scale, center)
        center, radius = center * scale, radius * scale.abs()
    if shift is not None:
        center = center + interval.per_channel(shift, center)
    if not relu:
        return center, radius, center.new_empty(0, dtype=torch.uint8)
    state = (center + radius > 0).to(torch.uint8) + (center - radius > 0).to(torch.uint8)
    return *interval.ibp_relu(center, radius), state


def pointwise_backward(
    grad_center: Tensor, grad_radius: Tensor, state: Tensor, center: Tensor | None, radius: Tensor | None,
    scale: Tensor | None, sums: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of center, radius, scale, shift. ``center`` and ``radius`` are the inputs, needed only with a scale;
    ``sums`` requests the gradient of shift."""
    if state.numel():
        to_upper = (grad_center + grad_radius) / 2 * (state > 0)
        to_lower = (grad_center - grad_radius) / 2 * (state > 1)
        grad_center, grad_radius = to_upper + to_lower, to_upper - to_lower
    else:
        grad_center, grad_radius = grad_center.clone(), grad_radius.clone()
    axes = [axis for axis in range(grad_center.ndim) if axis != 1]
    grad_shift = grad_center.sum(axes) if sums else None
    if scale is None or center is None or radius is None:
        return grad_center, grad_radius, None, grad_shift
    grad_scale = (grad_center * center).sum(axes) + (grad_radius * radius).sum(axes) * scale.sign()
    scale = interval.per_channel(scale, center)
    return grad_center * scale, grad_radius * scale.abs(), grad_scale, grad_shift


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised x, mean, biased variance)."""
    y, mean, variance = interval.batch_statistics_norm(x, weight, bias, eps)
    return packed(y, x), mean, variance


def batch_norm_backward(
    grad_y: Tensor, grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, variance: Tensor,
    weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias; the last two also without weight and bias."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    count = x.numel() // x.shape[1]
    inverse = torch.rsqrt(variance + eps)
    centered = x - interval.per_channel(mean, x)
    grad_bias = grad_y.sum(axes)
    grad_weight = (grad_y * centered).sum(axes) * inverse
    factor = inverse if weight is None else inverse * weight
    onto_centered = (2 * grad_variance - factor * inverse * grad_weight) / count
    constant = (grad_mean - factor * grad_bias) / count
    grad_x = (
        interval.per_channel(factor, x) * grad_y
        + interval.per_channel(onto_centered, x) * centered
        + interval.per_channel(constant, x)
    )
    return grad_x.to(x.dtype), grad_weight.to(x.dtype), grad_bias  # half types have float32 statistics


def margins(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return interval.ibp_margins(center, radius, weight, bias, labels)


def margins_backward(grad: Tensor, radius: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of radius, and of weight through the radius; the op adds the center's part."""
    classes, others = len(weight), _others(labels, len(weight))
    rows = weight[labels][:, None] - weight[others]
    grad_radius = -torch.einsum("bk,bkd->bd", grad, rows.abs())
    for_rows = -grad[..., None] * rows.sign() * radius[:, None]
    own, place, label = F.one_hot(labels, classes), torch.arange(classes, device=labels.device), labels[:, None]
    padded = F.pad(for_rows, (0, 0, 0, 1))  # for the label
    at = torch.where(place == label, classes - 1, place - (place > label).long()).unsqueeze(2)
    for_others = padded.gather(1, at.expand(-1, -1, padded.shape[2])).sum(0)
    return grad_radius, own.to(weight.dtype).T @ for_rows.sum(1) - for_others


def _others(labels: Tensor, classes: int) -> Tensor:
    others = torch.arange(classes - 1, device=labels.device).expand(len(labels), -1)
    return others + (others >= labels[:, None])


def crown(
    coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor, upper_intercept: Tensor, upper: bool
) -> tuple[Tensor, Tensor]:
    """(coefficients before the ReLU, term to add to the bias); the lines are (B, R or 1, N)."""
    nothing = coefficients.new_zeros(coefficients.shape[:2])
    return relaxation.crown_relu_step(coefficients, nothing, lower_slope, upper_slope, upper_intercept, upper=upper)


def crown_backward(
    grad: Tensor, grad_bias: Tensor, coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor,
    upper_intercept: Tensor, upper: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    below = (coefficients <= 0) if upper else (coefficients >= 0)
    grad_bias = grad_bias[..., None]
    for_coefficients = torch.where(below, lower_slope * grad, upper_slope * grad + upper_intercept * grad_bias)
    onto_upper = torch.where(below, 0, coefficients)
    grads = (torch.where(below, coefficients, 0) * grad, onto_upper * grad, onto_upper * grad_bias)
    lines = (lower_slope, upper_slope, upper_intercept)
    for_lower, for_upper, for_intercept = (g.sum_to_size(line.shape) for g, line in zip(grads, lines, strict=True))
    return for_coefficients, for_lower, for_upper, for_intercept


def topk_mask(scores: Tensor, rows: Tensor | None, k: int) -> Tensor:
    """``rows`` holds one k per row and replaces ``k``."""
    return sparse.topk_mask(scores, k if rows is None else rows)


def sparse_apply(x: Tensor, p: Tensor, scores: Tensor, rows: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return sparse.sparse_apply(x, p, scores, k if rows is None else rows)


def spgd_step(
    gradient: Tensor, p: Tensor, m: Tensor, x: Tensor, mask: Tensor, rows: Tensor | None, k: int,
    alpha: float, beta: float, projected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    budget = k if rows is None else rows
    return sparse.spgd_step(gradient, p, m, x, mask, budget, alpha=alpha, beta=beta, projected=projected)


def cut_box_minima(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    return cutting.cut_box_minima(forms, constants, cuts, offsets, rows)
