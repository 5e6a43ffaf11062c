"""The base of networks that shrink their images in convolutions of stride 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..errors import InputError, check
from .base import ACTIVATIONS, Architecture
from .flc import FrequencyLowCut


@dataclass(frozen=True)
class Strided(Architecture):
    """Convolutions without bias that keep the images' size or halve it, batch norms and activations.

    Args:
        downsampling: ``stride``; or ``flc``, where every convolution of stride 2, shortcuts included, becomes FLC
            pooling (arXiv 2204.00491) and a convolution of stride 1. FLC pooling has no bounds.
    """

    downsampling: Literal["stride", "flc"] = "stride"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.downsampling in ("stride", "flc"), "downsampling", self.downsampling, "stride, flc")

    def convolution(self, channels: int, features: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
        """(B, channels, H, W) → (B, features, ⌈H / stride⌉, ⌈W / stride⌉)."""
        if stride == 2 and self.downsampling == "flc":
            return nn.Sequential(FrequencyLowCut(), self.convolution(channels, features, kernel, 1, groups))
        return nn.Conv2d(channels, features, kernel, stride, kernel // 2, groups=groups, bias=False)

    def activated(self, features: int) -> list[nn.Module]:
        """A batch norm and the activation."""
        return [nn.BatchNorm2d(features), ACTIVATIONS[self.activation]()]

    def head(self, channels: int, classes: int) -> list[nn.Module]:
        """Each channel's average over the image, and a linear layer."""
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]

    def check_sides(self, shape: tuple[int, int, int], times: int) -> None:
        """Refuse images that cannot be halved this number of times.

        Raises:
            InputError: FLC pooling would meet a side that is not a multiple of 4.
        """
        _, height, width = shape
        multiple = 4 << times - 1
        if self.downsampling == "flc" and (height % multiple or width % multiple):
            raise InputError(
                f"model.downsampling flc: found images of {height}×{width}; "
                f"accepted: sides that are multiples of {multiple}, or downsampling: stride"
            )
