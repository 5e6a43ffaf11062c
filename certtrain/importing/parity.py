"""An independent evaluation of the file's tensors by the published geometry, to compare our model with.

It does not use ``certtrain.models``: strides and paddings are written down here a second time, on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Layer

GEOMETRY: dict[str, tuple[tuple[int, int], ...]] = {
    "Cnn3": ((2, 2), (2, 1)),
    "Cnn5": ((1, 1), (2, 1), (2, 1)),
    "Cnn7": ((1, 1), (1, 1), (2, 1), (1, 1), (1, 1), *((1, 1),) * 6),
    "Gowal small": ((2, 0), (1, 0)),
    "Gowal medium": ((1, 0), (2, 0), (1, 0), (2, 0)),
    "Gowal large": ((1, 0), (1, 0), (2, 0), (1, 0), (1, 0)),
    "Mlp": (),
    "SmallCnn": ((2, 1), (2, 1)),
}
"""Stride and padding of each convolution, in order. Cnn7's fifth stride follows from the first linear layer."""

EPSILON = 1e-5
"""Numerical stabiliser of batch norm: torch's default, used by all these projects."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu,
    "silu": F.silu,
}  # fmt: skip


def evaluate(
    layers: Sequence[Layer], images: Tensor, geometry: str, activation: str, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Logits (N, K) in float64 of images (N, C, H, W) in [0, 1], computed from the file's tensors.

    Args:
        layers: of the file, in the order of computation, with or without a normalisation.
        geometry: a key of ``GEOMETRY``.
        mean, std: of a normalisation outside the file; empty for none.
    """
    x = images.double()
    if len(mean):
        centre, scale = (torch.tensor(list(values)).double().reshape(1, -1, 1, 1) for values in (mean, std))
        x = (x - centre) / scale  # the numbers as float32 holds them
    strides = list(GEOMETRY[geometry])
    if geometry == "Cnn7":
        strides[4] = (_fifth_stride(layers, images.shape[-1]), 1)
    convolutions = iter(strides)
    for place, layer in enumerate(layers):
        tensors = {role: tensor.double() for role, tensor in layer.tensors.items()}
        if layer.kind == "normalisation":
            x = (x - tensors["mean"].reshape(1, -1, 1, 1)) / tensors["std"].reshape(1, -1, 1, 1)
            continue
        if layer.kind == "convolution":
            stride, padding = next(convolutions)
            x = F.conv2d(x, tensors["weight"], tensors.get("bias"), stride, padding)
        elif layer.kind == "linear":
            x = F.linear(x.flatten(1), tensors["weight"], tensors.get("bias"))
        else:
            moments = tensors["running_mean"], tensors["running_var"]
            x = F.batch_norm(x, *moments, tensors["weight"], tensors["bias"], training=False, eps=EPSILON)
        rest = layers[place + 1 :]
        if rest and rest[0].kind != "batch norm":
            x = ACTIVATIONS[activation](x)
    return x


def _fifth_stride(layers: Sequence[Layer], side: int) -> int:
    """The fifth stride, 1 or 2, with which the first linear layer reads half or a quarter of ``side``."""
    linear = next(layer for layer in layers if layer.kind == "linear").shapes["weight"][1]
    fifth = [layer for layer in layers if layer.kind == "convolution"][4].shapes["weight"][0]
    return 1 if math.isqrt(linear // fifth) == side // 2 else 2
