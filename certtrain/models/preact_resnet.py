from dataclasses import dataclass, replace

from torch import nn

from .residual_stages import BLOCKS, FourStages


@dataclass(frozen=True)
class PreActResNet(FourStages):
    """PreAct-ResNet-18, -34 and -50 for small images: norm and activation before each convolution (arXiv 1603.05027).

    The net of Fast-AT, N-FGSM and Fast-BAT, with a last batch norm and activation before the average: for CIFAR-10
    11 172 170, 21 280 330 and 23 513 162 parameters. Takes images of any size; with FLC pooling sides that are
    multiples of 16. With ``activation: softplus`` it is Fast-LS-l0's: softplus in the blocks, and a ReLU before the
    average.

    Args:
        depth: 18, 34, or 50 (of bottlenecks).
        width: features of the first stage; 64 is published.
    """

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        self.check_sides(shape, 3)
        stem = self.convolution(shape[0], self.width, 3)
        blocks, channels = self.stages(self.width, self.width, BLOCKS[self.depth])
        before_average = replace(self, activation="relu") if self.activation == "softplus" else self
        return [stem, *blocks, *before_average.activated(channels), *self.head(channels, classes)]

    def block(self, channels: int, features: int, stride: int) -> nn.Module:
        return self.pre_activated(channels, features, stride, self.branch(channels, features, stride))
