"""Convolutions in one and in two dimensions, told apart by their weights: (K, C / groups, length or height, width)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from .interval import Interval

Sizes = tuple[int, ...]


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """Of (B, C, length) or (B, C, height, width)."""
    function = F.conv1d if weight.ndim == 3 else F.conv2d
    return function(x, weight, bias, stride, padding, dilation, groups)


def transposed(
    forms: Tensor, weight: Tensor, shape: torch.Size, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """The adjoint: forms (N, K, *places) of a convolution's output as forms (N, *shape) of its input."""
    function = F.conv_transpose1d if weight.ndim == 3 else F.conv_transpose2d
    rest = [
        size - ((out - 1) * s - 2 * pad + d * (kernel - 1) + 1)
        for size, out, s, pad, d, kernel in zip(
            shape[1:], forms.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return function(forms, weight, None, stride, padding, rest, groups, dilation)


def interval(
    x: Interval,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Interval:
    """As ``kernels.ibp_conv2d``; one dimension is a row of an image."""
    flat = weight.ndim == 3
    if flat:
        x, weight = x.map(lambda t: t.unsqueeze(2)), weight.unsqueeze(2)
        stride, dilation = (1, *stride), (1, *dilation)
        padding = padding if isinstance(padding, str) else (0, *padding)
    found = Interval(
        *kernels.ibp_conv2d(
            x.center, x.radius, weight, bias, stride, padding, dilation, groups, scale=scale, shift=shift, relu=relu
        )
    )
    return found.map(lambda t: t.squeeze(2)) if flat else found
