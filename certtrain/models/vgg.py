from dataclasses import dataclass

from torch import nn

from ..errors import check
from .base import Architecture

STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""3×3 convolutions of each stage, by depth."""


@dataclass(frozen=True)
class Vgg(Architecture):
    """VGG for small images (arXiv 1409.1556): five stages of 3×3 convolutions with batch norm, and one linear layer.

    A max pool ends each stage; it rounds sides up, and the last image is averaged, so that images of any size fit.
    VGG-16 has 14 728 266 parameters for CIFAR-10.

    Args:
        depth: 11, 13, 16 or 19, as the net's name counts layers.
        width: channels of the first stage, 64 is published; the others have 2, 4, 8 and 8 times as many.
    """

    depth: int = 16
    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.depth in STAGES, "depth", self.depth, ", ".join(map(str, STAGES)))
        check(self.width >= 1, "width", self.width, "a whole number >= 1")

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        channels, layers = shape[0], []
        for times, count in zip((1, 2, 4, 8, 8), STAGES[self.depth], strict=True):
            for _ in range(count):
                layers += self.hidden_layer(nn.Conv2d(channels, times * self.width, 3, padding=1), batch_norm=True)
                channels = times * self.width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
