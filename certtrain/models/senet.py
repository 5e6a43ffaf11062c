from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import check
from .base import ACTIVATIONS
from .residual_stages import BLOCKS, ResidualStages


@dataclass(frozen=True)
class SeNet(ResidualStages):
    """SENet-18 and -34 for small images: pre-activation blocks with weighted channels (arXiv 1709.01507).

    As in the usual collection of CIFAR nets: batch norm and activation behind the first convolution, none before the
    average; 11 260 354 and 21 440 630 parameters for CIFAR-10. Takes images of any size; with FLC pooling sides that
    are multiples of 16. Products of activations have no bounds: it can be trained and attacked, not certified.

    Args:
        depth: 18 or 34.
        width: features of the first stage; 64 is published.
        reduction: features divided by the hidden features that the channel weights are computed from.
    """

    reduction: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.depth in (18, 34), "depth", self.depth, "18, 34")
        check(self.reduction >= 1, "reduction", self.reduction, "a whole number >= 1")

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        self.check_sides(shape, 3)
        stem = [self.convolution(shape[0], self.width, 3), *self.activated(self.width)]
        blocks, channels = self.stages(self.width, self.width, BLOCKS[self.depth])
        return [*stem, *blocks, *self.head(channels, classes)]

    def block(self, channels: int, features: int, stride: int) -> nn.Module:
        hidden, activation = max(1, features // self.reduction), ACTIVATIONS[self.activation]()
        squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(features, hidden, 1), activation, nn.Conv2d(hidden, features, 1)]
        branch = [*self.basic(channels, features, stride), SqueezeExcitation(nn.Sequential(*squeeze))]
        return self.pre_activated(channels, features, stride, branch)


class SqueezeExcitation(nn.Module):
    """x times a weight in (0, 1) for each channel, sigmoid(weigh(x))."""

    def __init__(self, weigh: nn.Module):
        super().__init__()
        self.weigh = weigh

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.weigh(x))
