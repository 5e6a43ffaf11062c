from dataclasses import dataclass

from torch import nn

from ..errors import InputError, check
from .base import Architecture


@dataclass(frozen=True)
class Cnn7(Architecture):
    """CNN7 as published, for 28×28 and 32×32 images (Shi et al., arXiv 2103.17268; arXiv 2305.13991).

    Five 3×3 convolutions (64, 64, 128 with stride 2, 128, 128) and two linear layers (512, K), each but the
    last with batch norm and ReLU: 13 259 338 parameters for MNIST, 17 192 650 for CIFAR-10.

    Args:
        width: channels of the first convolution; 64 is the published net.
        hidden: features of the first linear layer.
    """

    width: int = 64
    hidden: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 1, "width", self.width, "a whole number >= 1")
        check(self.hidden >= 1, "hidden", self.hidden, "a whole number >= 1")

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        channels, height, width = shape
        if height != width or height not in (28, 32):
            raise InputError(f"model.type Cnn7: found images of {height}×{width}; accepted: 28×28 or 32×32")
        layers: list[nn.Module] = []
        for features, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1)):
            features *= self.width
            layers += [nn.Conv2d(channels, features, 3, stride, padding=1), nn.BatchNorm2d(features), nn.ReLU()]
            channels = features
        flat = channels * (height // 2) ** 2
        layers += [nn.Flatten(), nn.Linear(flat, self.hidden), nn.BatchNorm1d(self.hidden), nn.ReLU()]
        return [*layers, nn.Linear(self.hidden, classes)]
