import math
from dataclasses import dataclass

from torch import nn

from ..errors import check
from .base import Architecture, batch_norm


@dataclass(frozen=True)
class Mlp(Architecture):
    """Linear layers with ReLUs between them.

    Args:
        hidden: features of each hidden layer.
        batch_norm: after every layer but the last.
    """

    hidden: tuple[int, ...] = (100, 100)
    batch_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(all(width >= 1 for width in self.hidden), "hidden", self.hidden, "a list of whole numbers >= 1")

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Flatten()]
        features = math.prod(shape)
        for width in self.hidden:
            layers.append(nn.Linear(features, width))
            layers += [*batch_norm(self.batch_norm, nn.BatchNorm1d(width)), nn.ReLU()]
            features = width
        return [*layers, nn.Linear(features, classes)]
