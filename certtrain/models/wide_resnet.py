from dataclasses import dataclass

from torch import nn

from ..errors import check
from .residual_stages import ResidualStages


@dataclass(frozen=True)
class WideResNet(ResidualStages):
    """WRN-depth-widen: stages of pre-activation blocks with 16, 32 and 64 times ``widen`` features (arXiv 1605.07146).

    For CIFAR-10 WRN-16-8 has 10 961 370, WRN-28-10 36 479 194 and WRN-34-10 46 160 474 parameters. Takes images of any
    size; with FLC pooling sides that are multiples of 8. The net that Fast-BAT's code calls WRN-16-8 has a block more
    in each stage than its name says: ``depth=22, widen=8, dropout=0.1`` (17 158 106 parameters). N-FGSM's WRN-28-10 is
    another net: strides in the second convolutions of blocks, and biases.

    Args:
        depth: 6·n + 4 for n blocks in each stage.
        width: channels before the first stage; 16 is published.
        widen: the first stage has ``width`` times as many features.
        dropout: probability, between the convolutions of a block.
    """

    depth: int = 28
    width: int = 16
    widen: int = 10
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.depth >= 10 and self.depth % 6 == 4, "depth", self.depth, "10, 16, 22, 28, 34, …")
        check(self.widen >= 1, "widen", self.widen, "a whole number >= 1")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        self.check_sides(shape, 2)
        stem = self.convolution(shape[0], self.width, 3)
        blocks, channels = self.stages(self.width, self.width * self.widen, ((self.depth - 4) // 6,) * 3)
        return [stem, *blocks, *self.activated(channels), *self.head(channels, classes)]

    def block(self, channels: int, features: int, stride: int) -> nn.Module:
        branch = self.basic(channels, features, stride, self.dropout)
        return self.pre_activated(channels, features, stride, branch)
