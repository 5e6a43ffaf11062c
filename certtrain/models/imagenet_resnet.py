from dataclasses import dataclass

from torch import nn

from .residual_stages import PostActivated


@dataclass(frozen=True)
class ImageNetResNet(PostActivated):
    """ResNet-18, -34 and -50 with the stem for large images: 7×7 with stride 2, and a 3×3 max pool with stride 2.

    He et al. (arXiv 1512.03385): for 100 classes 11 227 812, 21 335 972 and 23 712 932 parameters, layer by layer
    torchvision's nets, which draw other initial weights. Meant for images of 224×224; any size works, with FLC pooling
    sides that are multiples of 64. The max pool stays where the strides become FLC pooling.

    Args:
        depth: 18, 34, or 50 (of bottlenecks).
        width: features of the first stage; 64 is published.
    """

    depth: int = 34

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        self.check_sides(shape, 5)
        return super().layers(shape, classes)

    def stem(self, channels: int) -> list[nn.Module]:
        return [self.convolution(channels, self.width, 7, 2), *self.activated(self.width), nn.MaxPool2d(3, 2, 1)]
