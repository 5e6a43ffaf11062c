"""Interval arithmetic (Gowal et al., arXiv 1810.12715, last-layer elision included).

Notation: an interval is (center, radius) with radius >= 0; lower = center - radius, upper = center + radius.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """(C,) → (C, 1, 1, …), broadcastable along dimension 1 of ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 2))


def ibp_affine(
    center: Tensor, radius: Tensor, scale: Tensor, shift: Tensor, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    scale, shift = per_channel(scale, center), per_channel(shift, center)
    center, radius = center * scale + shift, radius * scale.abs()
    return ibp_relu(center, radius) if relu else (center, radius)


def ibp_relu(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = F.relu(center - radius), F.relu(center + radius)
    return upper / 2 + lower / 2, (upper - lower) / 2


def fold(
    weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) with a per-channel affine map after the layer folded in; exact up to rounding."""
    if scale is not None:
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = None if bias is None else bias * scale
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return weight, bias


def ibp_linear(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None = None,
    *, scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weight, bias = fold(weight, bias, scale, shift)
    center, radius = F.linear(center, weight, bias), F.linear(radius, weight.abs())
    return ibp_relu(center, radius) if relu else (center, radius)


def ibp_conv2d(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: int | Sequence[int] = 1, padding: int | Sequence[int] | str = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1, *, scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weight, bias = fold(weight, bias, scale, shift)
    center = F.conv2d(center, weight, bias, stride, padding, dilation, groups)
    radius = F.conv2d(radius, weight.abs(), None, stride, padding, dilation, groups)
    return ibp_relu(center, radius) if relu else (center, radius)


def ibp_margins(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    classes = len(weight)
    others = torch.arange(classes - 1, device=labels.device).expand(len(labels), -1)
    others = others + (others >= labels[:, None])  # j != y, increasing
    # embedding, not indexing: the gradient of indexing is summed in a thread-dependent order
    rows = F.embedding(labels, weight)[:, None] - F.embedding(others, weight)
    lower = torch.einsum("bkd,bd->bk", rows, center) - torch.einsum("bkd,bd->bk", rows.abs(), radius)
    return lower if bias is None else lower + bias[labels][:, None] - bias[others]


def batch_statistics_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    axes = [axis for axis in range(x.ndim) if axis != 1]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(wide, dim=axes, correction=0)
    # torch's fused norm returns its statistics without gradients, var_mean with them
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps), mean, variance
