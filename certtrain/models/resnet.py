from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..errors import check
from .base import ACTIVATIONS, Architecture


@dataclass(frozen=True)
class ResNet(Architecture):
    """A short residual network for training with interval bounds: each residual sum adds up the widths of two boxes.

    A 3×3 convolution, then stages of residual blocks with width, 2·width, 4·width, … channels; the first block of every
    stage but the first has stride 2. A block is two 3×3 convolutions, whose result is added to the block's input
    (through a 1×1 convolution where the shape changes) before the activation (He et al., arXiv 1512.03385). Meant for
    28×28 to 64×64 images; any size works.

    Args:
        width: channels of the first stage.
        blocks: number of blocks of each stage.
        head: ``average`` each channel of the last stage, or ``flatten`` it into a hidden linear layer, as CNN7 does.
        hidden: features of that hidden linear layer; ignored where the head averages.
        batch_norm: after every layer but the last.
    """

    width: int = 32
    blocks: tuple[int, ...] = (1, 1, 1)
    head: Literal["flatten", "average"] = "average"
    hidden: int = 512
    batch_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 1, "width", self.width, "a whole number >= 1")
        whole = len(self.blocks) > 0 and all(count >= 1 for count in self.blocks)
        check(whole, "blocks", self.blocks, "a list of whole numbers >= 1, at least one")
        check(self.head in ("flatten", "average"), "head", self.head, "flatten, average")
        check(self.hidden >= 1, "hidden", self.hidden, "a whole number >= 1")

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        channels, height, width = shape
        layers = self.hidden_layer(nn.Conv2d(channels, self.width, 3, padding=1), self.batch_norm)
        channels = self.width
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                features, stride = self.width << stage, 2 if stage and not block else 1
                layers.append(self._block(channels, features, stride))
                channels = features
                height, width = (side if stride == 1 else (side + 1) // 2 for side in (height, width))
        if self.head == "average":
            return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        flat = nn.Linear(channels * height * width, self.hidden)
        return [*layers, nn.Flatten(), *self.hidden_layer(flat, self.batch_norm), nn.Linear(self.hidden, classes)]

    def _block(self, channels: int, features: int, stride: int) -> nn.Module:
        first = self.hidden_layer(nn.Conv2d(channels, features, 3, stride, padding=1), self.batch_norm)
        second = self.hidden_layer(nn.Conv2d(features, features, 3, padding=1), self.batch_norm)[:-1]
        shortcut = nn.Identity()
        if channels != features or stride != 1:
            shortcut = nn.Sequential(*self.hidden_layer(nn.Conv2d(channels, features, 1, stride), self.batch_norm)[:-1])
        return Residual(nn.Sequential(*first, *second), shortcut, ACTIVATIONS[self.activation]())


class Residual(nn.Module):
    """activation(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module):
        super().__init__()
        self.branch, self.shortcut, self.activation = branch, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))
