"""The base of residual networks for small images: stages of blocks, each stage but the first halving the image."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..errors import check
from .base import ACTIVATIONS
from .resnet import Residual
from .strided import Strided

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Number of blocks of each stage, by depth (arXiv 1512.03385); those of depth 50 are bottlenecks."""

ShortcutFrom = Literal["entry", "input"]


@dataclass(frozen=True)
class ResidualStages(Strided):
    """A 3×3 convolution of stride 1 and stages of residual blocks with width, 2·width, 4·width, … features.

    Args:
        depth: layers with weights, as the net's name counts them.
        width: features of the first stage.
    """

    depth: int = 18
    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 1, "width", self.width, "a whole number >= 1")

    @property
    def expansion(self) -> int:
        """Output channels of a block divided by its features."""
        return 1

    @abstractmethod
    def block(self, channels: int, features: int, stride: int) -> nn.Module:
        """(B, channels, H, W) → (B, expansion · features, ⌈H / stride⌉, ⌈W / stride⌉)."""

    def stages(self, channels: int, features: int, counts: tuple[int, ...]) -> tuple[list[nn.Module], int]:
        """The blocks of stages with ``counts`` blocks and features, 2·features, …; and the number of output
        channels."""
        blocks = []
        for stage, count in enumerate(counts):
            for number in range(count):
                blocks.append(self.block(channels, features << stage, 2 if stage and not number else 1))
                channels = self.expansion * features << stage
        return blocks, channels

    def basic(self, channels: int, features: int, stride: int, dropout: float = 0.0) -> list[nn.Module]:
        """Two 3×3 convolutions with batch norm, activation and optional dropout between them."""
        first, last = self.convolution(channels, features, 3, stride), self.convolution(features, features, 3)
        return [first, *self.activated(features), *([nn.Dropout(dropout)] if dropout else []), last]

    def bottleneck(self, channels: int, features: int, stride: int) -> list[nn.Module]:
        """1×1, 3×3 and 1×1 convolution, the last one with 4·features; batch norm and activation between them."""
        first, middle = self.convolution(channels, features, 1), self.convolution(features, features, 3, stride)
        last = self.convolution(features, 4 * features, 1)
        return [first, *self.activated(features), middle, *self.activated(features), last]

    def pre_activated(
        self, channels: int, features: int, stride: int, branch: list[nn.Module], shortcut_from: ShortcutFrom = "entry"
    ) -> nn.Module:
        """A block with batch norm and activation first; the shortcut is a 1×1 convolution where the shape changes."""
        same = channels == self.expansion * features and stride == 1
        shortcut = None if same else self.convolution(channels, self.expansion * features, 1, stride)
        entry = nn.Sequential(*self.activated(channels))
        return PreActivated(entry, nn.Sequential(*branch), shortcut, shortcut_from)


@dataclass(frozen=True)
class FourStages(ResidualStages):
    """Four stages with the numbers of blocks in ``BLOCKS``: of two convolutions, or of three at depth 50."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.depth in BLOCKS, "depth", self.depth, ", ".join(map(str, BLOCKS)))

    @property
    def expansion(self) -> int:
        return 4 if self.depth >= 50 else 1

    def branch(self, channels: int, features: int, stride: int) -> list[nn.Module]:
        """The convolutions of a block."""
        return (self.bottleneck if self.depth >= 50 else self.basic)(channels, features, stride)


@dataclass(frozen=True)
class PostActivated(FourStages):
    """Residual blocks with batch norm and activation behind each convolution (arXiv 1512.03385).

    Args:
        branch_activation: whether the branch's last batch norm, too, is followed by the activation, before the sum. In
            the published net only the sum is; NuAT's ResNet-18 has both.
    """

    branch_activation: bool = False

    @abstractmethod
    def stem(self, channels: int) -> list[nn.Module]:
        """The layers before the stages, from ``channels`` to ``width`` channels."""

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        stem = self.stem(shape[0])
        blocks, channels = self.stages(self.width, self.width, BLOCKS[self.depth])
        return [*stem, *blocks, *self.head(channels, classes)]

    def branch_end(self, features: int) -> list[nn.Module]:
        """The layers behind the last convolution of a branch."""
        return self.activated(features) if self.branch_activation else [nn.BatchNorm2d(features)]

    def block(self, channels: int, features: int, stride: int) -> nn.Module:
        after = self.expansion * features
        branch = nn.Sequential(*self.branch(channels, features, stride), *self.branch_end(after))
        shortcut = nn.Identity()
        if channels != after or stride != 1:
            shortcut = nn.Sequential(self.convolution(channels, after, 1, stride), nn.BatchNorm2d(after))
        return Residual(branch, shortcut, ACTIVATIONS[self.activation]())


class PreActivated(nn.Module):
    """branch(y) + shortcut(y), where y = entry(x); branch(y) + x without a shortcut (arXiv 1603.05027).

    Args:
        shortcut_from: what the shortcut reads, ``entry``, y, or ``input``, x.
    """

    def __init__(
        self, entry: nn.Module, branch: nn.Module, shortcut: nn.Module | None, shortcut_from: ShortcutFrom = "entry"
    ):
        super().__init__()
        self.entry, self.branch, self.shortcut = entry, branch, shortcut
        self.shortcut_from = shortcut_from

    def forward(self, x: Tensor) -> Tensor:
        y = self.entry(x)
        if self.shortcut is None:
            return self.branch(y) + x
        return self.branch(y) + self.shortcut(x if self.shortcut_from == "input" else y)
