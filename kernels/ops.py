"""The public ops: checks and documentation once, above the backends (today: the plain torch reference).

An interval is a pair (center, radius) of equal shape, dtype and device with radius >= 0. All ops are
differentiable once in every floating-point argument (a second derivative through ``ibp_linear`` or a ReLU raises)
and accept any stride and empty batches. float32 and float64 are
rounded to nearest: the bounds hold up to the layer's own rounding error, which is not added to the radius.
"""

import torch
from torch import Tensor

from . import reference
from .autograd import IbpMatmul, IbpRelu


def _check_interval(center: Tensor, radius: Tensor) -> None:
    if center.shape != radius.shape:
        raise ValueError(f"radius: found shape {tuple(radius.shape)}; expected that of center, {tuple(center.shape)}")
    if center.dtype != radius.dtype:
        raise TypeError(f"radius: found {radius.dtype}; expected that of center, {center.dtype}")


def _check_features(name: str, values: Tensor | None, count: int, dtype: torch.dtype) -> None:
    if values is not None and values.shape != (count,):
        raise ValueError(f"{name}: found shape {tuple(values.shape)}; expected ({count},)")
    if values is not None:
        _check_dtype(name, values, dtype)


def _check_dtype(name: str, values: Tensor, dtype: torch.dtype) -> None:
    if values.dtype != dtype:
        raise TypeError(f"{name}: found {values.dtype}; expected {dtype}")


def ibp_affine(center: Tensor, radius: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of ``scale * x + shift`` per channel, for example a folded batch norm.

    Args:
        center, radius: (B, C, *spatial).
        scale, shift: (C,); a negative scale is fine.
    Returns:
        (center, radius) of the same shape; exact per entry.
    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, naming the argument.
    """
    _check_interval(center, radius)
    _check_features("scale", scale, center.shape[1], center.dtype)
    _check_features("shift", shift, center.shape[1], center.dtype)
    return reference.ibp_affine(center, radius, scale, shift)


def ibp_relu(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of max(x, 0), any shape; exact per entry. At a kink the gradient is torch's (0 at 0)."""
    _check_interval(center, radius)
    return IbpRelu.apply(center, radius)


def ibp_linear(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None = None,
    *, scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Interval of a linear layer, optionally followed by a per-feature affine map and a ReLU.

    Args:
        center, radius: (B, *, D).
        weight: (H, D); bias: (H,) or None.
        scale, shift: (H,) or None, applied after the layer (a folded batch norm).
        relu: whether max(., 0) follows.
    Returns:
        (center, radius), each (B, *, H); exact per output for an input box (Gowal et al., arXiv 1810.12715).
    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, naming the argument.
    """
    _check_interval(center, radius)
    if weight.ndim != 2 or weight.shape[1] != center.shape[-1]:
        raise ValueError(f"weight: found shape {tuple(weight.shape)}; expected (H, {center.shape[-1]})")
    _check_dtype("weight", weight, center.dtype)
    for name, values in (("bias", bias), ("scale", scale), ("shift", shift)):
        _check_features(name, values, weight.shape[0], center.dtype)
    center, radius = IbpMatmul.apply(center, radius, weight)
    if scale is not None:  # on the outputs: they are far smaller than the weight
        center, radius = center * scale, radius * scale.abs()
        bias = None if bias is None else bias * scale
    for constant in (bias, shift):
        center = center if constant is None else center + constant
    return IbpRelu.apply(center, radius) if relu else (center, radius)


def ibp_conv2d(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1, groups: int = 1,
    *, scale: Tensor | None = None, shift: Tensor | None = None, relu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Interval of a zero-padded convolution, optionally followed by a per-channel affine map and a ReLU.

    Args:
        center, radius: (B, C, H, W). Padding is known to be zero: it has radius 0.
        weight: (K, C / groups, h, w); bias: (K,) or None; stride … groups as in ``torch.nn.functional.conv2d``.
        scale, shift: (K,) or None, applied after the layer (a folded batch norm).
        relu: whether max(., 0) follows.
    Returns:
        (center, radius), each (B, K, H', W'); exact per output for an input box.
    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, naming the argument.
    """
    _check_interval(center, radius)
    if center.ndim != 4:
        raise ValueError(f"center: found {center.ndim} dimensions; expected (B, C, H, W)")
    if weight.ndim != 4 or weight.shape[1] * groups != center.shape[1]:
        raise ValueError(
            f"weight: found shape {tuple(weight.shape)} with groups={groups}; "
            f"expected (K, {center.shape[1]} / groups, h, w)"
        )
    _check_dtype("weight", weight, center.dtype)
    for name, values in (("bias", bias), ("scale", scale), ("shift", shift)):
        _check_features(name, values, weight.shape[0], center.dtype)
    center, radius = reference.ibp_conv2d(
        center, radius, weight, bias, stride, padding, dilation, groups, scale=scale, shift=shift
    )
    return IbpRelu.apply(center, radius) if relu else (center, radius)


def ibp_margins(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Lower bounds of all margins z_y - z_j of the logits z = W x + b: last-layer elision.

    Merging the specification into the last layer uses |w_y - w_j| <= |w_y| + |w_j|, so the result is never
    below (and mostly above) the difference of the logits' own bounds (arXiv 1810.12715).

    Args:
        center, radius: (B, D), the last hidden interval.
        weight: (K, D); bias: (K,) or None.
        labels: (B,) int64 in [0, K).
    Returns:
        (B, K - 1), columns j != y in increasing order.
    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, naming the argument.
    """
    _check_interval(center, radius)
    if weight.ndim != 2 or center.ndim != 2 or weight.shape[1] != center.shape[1]:
        raise ValueError(f"weight: found shape {tuple(weight.shape)} for center {tuple(center.shape)}; expected (K, D)")
    _check_dtype("weight", weight, center.dtype)
    _check_features("bias", bias, weight.shape[0], center.dtype)
    _check_features("labels", labels, center.shape[0], torch.int64)
    return reference.ibp_margins(center, radius, weight, bias, labels)


def batch_statistics_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm over the batch's own statistics, which it returns *with their gradients*.

    Args:
        x: (B, C, *spatial), at least two values per channel.
        weight, bias: (C,) or None.
        eps: the stabiliser added to the variance.
    Returns:
        normalised x; mean (C,); biased variance (C,). All three are differentiable in ``x``, which torch's
        fused batch norm does not offer and certified training needs (its bounds use these statistics).
    """
    _check_features("weight", weight, x.shape[1], x.dtype)
    _check_features("bias", bias, x.shape[1], x.dtype)
    return reference.batch_statistics_norm(x, weight, bias, eps)
