"""Memory layout of the pointwise kernels' tensors: (outer, channels, inner), densely packed.

A contiguous (B, C, *spatial) is (B, C, spatial); a channels_last one is (B·spatial, C, 1). Other tensors are first
copied to one of the two. Outputs have the layout of ``memory_format``, in real and fake tensors alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Sizes of a packed tensor's three dimensions, in memory order."""

    outer: int
    channels: int
    inner: int


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last for a tensor packed that way and not also contiguous, otherwise contiguous."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def packed(x: Tensor, like: Tensor) -> Tensor:
    """x in the layout of ``like``, copied if it has another."""
    return x.contiguous(memory_format=memory_format(like))


def empty(like: Tensor, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Tensor:
    return torch.empty(
        like.shape if shape is None else shape,
        dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(like),
    )  # fmt: skip


def layout_of(x: Tensor) -> Layout:
    """The layout of a packed tensor with channels in dimension 1; a tensor with fewer dimensions is one row."""
    if x.ndim < 2:
        return Layout(1, x.numel(), 1)
    batch, channels = x.shape[:2]
    inner = x[0, 0].numel() if x.numel() else 0
    if memory_format(x) == torch.channels_last:
        return Layout(batch * inner, channels, 1)
    return Layout(batch, channels, inner)


def flat(x: Tensor) -> Tensor:
    """The entries of a packed tensor in memory order, (N,); shares its storage."""
    return x.as_strided((x.numel(),), (1,))
