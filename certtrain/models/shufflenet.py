from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import check
from .strided import Strided

STEM, COUNTS = 24, (4, 8, 4)


@dataclass(frozen=True)
class ShuffleNetV2(Strided):
    """ShuffleNetV2 for small images (arXiv 1807.11164): the stem is 3×3 with stride 1, without a pool.

    Three stages of units with width, 2·width and 4·width channels; the first unit of each halves the image. 1 263 854
    parameters for CIFAR-10. The net's factors 0.5, 1, 1.5 and 2 are the widths 48, 116, 176 and 244, the last one with
    ``last=2048``. Takes images of any size; with FLC pooling sides that are multiples of 16.

    Args:
        width: channels of the first stage, an even number; 116 is published as factor 1.
        last: channels of the 1×1 convolution before the average.
    """

    width: int = 116
    last: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 2 and self.width % 2 == 0, "width", self.width, "an even number >= 2")
        check(self.last >= 1, "last", self.last, "a whole number >= 1")

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        self.check_sides(shape, 3)
        layers, channels = [self.convolution(shape[0], STEM, 3), *self.activated(STEM)], STEM
        for stage, count in enumerate(COUNTS):
            features = self.width << stage
            layers += [self._halving(channels, features), *(self._unit(features) for _ in range(count - 1))]
            channels = features
        layers += [self.convolution(channels, self.last, 1), *self.activated(self.last)]
        return [*layers, *self.head(self.last, classes)]

    def _halving(self, channels: int, features: int) -> nn.Module:
        """A unit of stride 2: both branches read all channels, and each returns half of the features."""
        half = features // 2
        beside = [*self._depthwise(channels, 2), self.convolution(channels, half, 1), *self.activated(half)]
        return ShuffleUnit(nn.Sequential(*beside), self._branch(channels, half, 2), half)

    def _unit(self, features: int) -> nn.Module:
        """A unit of stride 1: one half of the channels passes unchanged."""
        return ShuffleUnit(None, self._branch(features // 2, features // 2, 1), features // 2)

    def _branch(self, channels: int, features: int, stride: int) -> nn.Module:
        first, last = self.convolution(channels, features, 1), self.convolution(features, features, 1)
        depthwise = self._depthwise(features, stride)
        return nn.Sequential(first, *self.activated(features), *depthwise, last, *self.activated(features))

    def _depthwise(self, channels: int, stride: int) -> list[nn.Module]:
        return [self.convolution(channels, channels, 3, stride, groups=channels), nn.BatchNorm2d(channels)]


class ShuffleUnit(nn.Module):
    """Interleave the channels of ``beside(x)`` and ``branch(x)``.

    Without ``beside``, the first ``kept`` channels of x pass unchanged and ``branch`` reads the others.
    """

    def __init__(self, beside: nn.Module | None, branch: nn.Module, kept: int):
        super().__init__()
        self.beside, self.branch, self.kept = beside, branch, kept
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.beside is None:
            first, second = x[:, : self.kept], self.branch(x[:, self.kept :])
        else:
            first, second = self.beside(x), self.branch(x)
        return self.shuffle(torch.cat([first, second], 1))
