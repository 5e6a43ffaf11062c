from dataclasses import dataclass

from torch import nn

from ..errors import InputError, check
from .base import Architecture, batch_norm


@dataclass(frozen=True)
class SmallCnn(Architecture):
    """Two 4×4 convolutions of stride 2 (width, 2·width) and two linear layers (hidden, K): for a laptop.

    Args:
        width: channels of the first convolution.
        hidden: features of the first linear layer.
        batch_norm: after every layer but the last.
    """

    width: int = 16
    hidden: int = 100
    batch_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 1, "width", self.width, "a whole number >= 1")
        check(self.hidden >= 1, "hidden", self.hidden, "a whole number >= 1")

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        channels, height, width = shape
        if min(height, width) < 4:
            raise InputError(f"model.type SmallCnn: found images of {height}×{width}; accepted: 4×4 or larger")
        layers: list[nn.Module] = []
        for features in (self.width, 2 * self.width):
            layers.append(nn.Conv2d(channels, features, 4, stride=2, padding=1))
            layers += [*batch_norm(self.batch_norm, nn.BatchNorm2d(features)), nn.ReLU()]
            channels, height, width = features, height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(channels * height * width, self.hidden)]
        layers += [*batch_norm(self.batch_norm, nn.BatchNorm1d(self.hidden)), nn.ReLU()]
        return [*layers, nn.Linear(self.hidden, classes)]
