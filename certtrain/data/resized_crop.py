"""Random crops of any size and shape, resized to one size by batched antialiased bilinear resampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..noise import Noise
from ..step import Augmentation

SCALE = (0.08, 1.0)
"""Range of the share of the image's area, drawn uniformly."""

RATIO = (3 / 4, 4 / 3)
"""Range of width / height, whose logarithm is drawn uniformly."""

ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class ResizedCrop(Augmentation):
    """The rectangle of each stored image that became the augmented image, and whether it was flipped.

    Args:
        height, width: (B,) int64, the rectangle's size before resizing.
    """

    height: Tensor
    width: Tensor

    def rows_and_columns(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        raise InputError(
            "training.augment.resized_crop: found resized crops, whose pixels are not pixels of the stored image, and "
            "a method that keeps a perturbation for each sample; accepted: null (only pad and flip)"
        )


def draw(height: int, width: int, flip: bool, noise: Noise) -> ResizedCrop:
    """Draw as torchvision's RandomResizedCrop: the first of ten rectangles that fits, else the largest central one with
    an allowed ratio."""
    share, place = (noise.uniform((ATTEMPTS,), f"crop/{name}", torch.float64) for name in ("area", "ratio"))
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * share)
    low, high = map(math.log, RATIO)
    ratio = torch.exp(low + (high - low) * place)
    tall, wide = (torch.round(torch.sqrt(product)).long() for product in (area / ratio, area * ratio))
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    first, found = fits.byte().argmax(1, keepdim=True), fits.any(1)
    largest = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    tall, wide = (
        torch.where(found, drawn.gather(1, first).squeeze(1), side)
        for drawn, side in zip((tall, wide), largest, strict=True)
    )

    def offset(spare: Tensor, stream: str) -> Tensor:
        drawn = (noise.uniform((), stream, torch.float64) * (spare + 1)).long()
        return torch.where(found, drawn, spare // 2)

    top, left = offset(height - tall, "top"), offset(width - wide, "left")
    return ResizedCrop(top, left, noise.integers(2, stream="flip").bool() & flip, height=tall, width=wide)


def resize(images: Tensor, crop: ResizedCrop, size: int) -> Tensor:
    """Resize each image's crop: (B, C, H, W) → (B, C, size, size) in [0, 1].

    Computes torch's antialiased bilinear interpolation: a triangular filter of at least one pixel to each side, cut off
    at the crop's edges. Sums have a fixed order, so that an image's result is the same to the last bit in any batch.
    """
    rows = _weights(crop.top, crop.height, images.shape[2], size, torch.zeros_like(crop.flip))
    columns = _weights(crop.left, crop.width, images.shape[3], size, crop.flip)
    resized = _sums(images.transpose(1, 2), *rows)  # (B, size, C, W)
    resized = _sums(resized.permute(0, 3, 2, 1), *columns)  # (B, size, C, size): column, channel, row
    return resized.permute(0, 2, 3, 1).clamp(0, 1).contiguous()  # rounding may leave [0, 1]


def _weights(start: Tensor, length: Tensor, side: int, size: int, flip: Tensor) -> tuple[Tensor, Tensor]:
    """The source pixels of each new pixel, (B, size, T) int64, and their weights, float64.

    T depends on ``side`` and ``size`` only.
    """
    device = start.device
    new = torch.arange(size, device=device).expand(len(start), -1)
    new = torch.where(flip[:, None], size - 1 - new, new)
    step = length.double()[:, None] / size
    support = step.clamp(min=1)
    center = start[:, None] + (new + 0.5) * step
    first = torch.floor(center - support + 0.5).long()
    pixels = first[:, :, None] + torch.arange(math.ceil(2 * max(1.0, side / size)), device=device)
    weights = (1 - (pixels + 0.5 - center[:, :, None]).abs() / support[:, :, None]).clamp(min=0)
    stop = (start + length)[:, None, None]
    weights = torch.where((pixels >= start[:, None, None]) & (pixels < stop), weights, 0.0)
    return pixels.clamp(0, side - 1), weights / weights.sum(2, keepdim=True)


def _sums(images: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums along the second dimension: (B, L, …) → (B, size, …)."""
    sample = torch.arange(len(images), device=images.device)[:, None]
    weights = weights.to(images.dtype)[..., None, None]
    total = weights[:, :, 0] * images[sample, pixels[:, :, 0]]
    for tap in range(1, pixels.shape[2]):
        total += weights[:, :, tap] * images[sample, pixels[:, :, tap]]
    return total
