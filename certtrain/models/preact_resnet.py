from dataclasses import dataclass, replace
from typing import get_args

from torch import nn

from ..errors import check
from .residual_stages import BLOCKS, FourStages, ShortcutFrom


@dataclass(frozen=True)
class PreActResNet(FourStages):
    """PreAct-ResNet-18, -34 and -50 for small images: norm and activation before each convolution (arXiv 1603.05027).

    With a last batch norm and activation before the average 11 172 170, 21 280 330 and 23 513 162 parameters for
    CIFAR-10. Takes images of any size; with FLC pooling sides that are multiples of 16. With ``activation: softplus``
    it is Fast-LS-l0's: softplus in the blocks, and a ReLU before the average.

    Released nets of the same weights compute different functions. ``shortcut: input`` is PreAct-ResNet-18 of Fast-AT,
    N-FGSM, GradAlign, Fast-BAT, N-AAER and FLC pooling; ``entry`` that of sPGD, AT-AWP and FGSM-CKPT, and every
    PreAct-ResNet-50. GradAlign and FGSM-CKPT average without a last batch norm (11 171 146 parameters).

    Args:
        depth: 18, 34, or 50 (of bottlenecks).
        width: features of the first stage; 64 is published.
        shortcut: what the 1×1 convolution of a shortcut reads: the block's ``entry``, that is its input behind batch
            norm and activation, or the ``input`` itself.
        last_norm: whether batch norm and activation come before the average.
    """

    shortcut: ShortcutFrom = "entry"
    last_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.shortcut in get_args(ShortcutFrom), "shortcut", self.shortcut, ", ".join(get_args(ShortcutFrom)))

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        self.check_sides(shape, 3)
        stem = self.convolution(shape[0], self.width, 3)
        blocks, channels = self.stages(self.width, self.width, BLOCKS[self.depth])
        before_average = replace(self, activation="relu") if self.activation == "softplus" else self
        last = before_average.activated(channels) if self.last_norm else []
        return [stem, *blocks, *last, *self.head(channels, classes)]

    def block(self, channels: int, features: int, stride: int) -> nn.Module:
        return self.pre_activated(
            channels, features, stride, self.branch(channels, features, stride), shortcut_from=self.shortcut
        )
