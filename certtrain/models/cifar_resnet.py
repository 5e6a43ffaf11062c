from dataclasses import dataclass

from torch import nn

from .base import ACTIVATIONS
from .residual_stages import BLOCKS, FourStages
from .resnet import Residual


@dataclass(frozen=True)
class CifarResNet(FourStages):
    """ResNet-18, -34 and -50 with the stem for small images, 3×3 with stride 1 and no pool (arXiv 1512.03385).

    For CIFAR-10 11 173 962, 21 282 122 and 23 520 842 parameters. Takes images of any size; with FLC pooling sides that
    are multiples of 16. ``ResNet`` is the short net that interval bounds can train; bounds of this one are sound, and
    wide.

    Args:
        depth: 18, 34, or 50 (of bottlenecks).
        width: features of the first stage; 64 is published.
    """

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        self.check_sides(shape, 3)
        stem = [self.convolution(shape[0], self.width, 3), *self.activated(self.width)]
        blocks, channels = self.stages(self.width, self.width, BLOCKS[self.depth])
        return [*stem, *blocks, *self.head(channels, classes)]

    def block(self, channels: int, features: int, stride: int) -> nn.Module:
        after = self.expansion * features
        branch = nn.Sequential(*self.branch(channels, features, stride), nn.BatchNorm2d(after))
        shortcut = nn.Identity()
        if channels != after or stride != 1:
            shortcut = nn.Sequential(self.convolution(channels, after, 1, stride), nn.BatchNorm2d(after))
        return Residual(branch, shortcut, ACTIVATIONS[self.activation]())
