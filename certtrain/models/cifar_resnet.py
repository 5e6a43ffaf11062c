from dataclasses import dataclass

from torch import nn

from .residual_stages import PostActivated


@dataclass(frozen=True)
class CifarResNet(PostActivated):
    """ResNet-18, -34 and -50 with the stem for small images, 3×3 with stride 1 and no pool (arXiv 1512.03385).

    For CIFAR-10 11 173 962, 21 282 122 and 23 520 842 parameters. Takes images of any size; with FLC pooling sides that
    are multiples of 16. Its bounds are sound and wide; ``ResNet`` is a shorter net that interval bounds can train.

    Args:
        depth: 18, 34, or 50 (of bottlenecks).
        width: features of the first stage; 64 is published.
    """

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        self.check_sides(shape, 3)
        return super().layers(shape, classes)

    def stem(self, channels: int) -> list[nn.Module]:
        return [self.convolution(channels, self.width, 3), *self.activated(self.width)]
