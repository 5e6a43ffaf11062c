from dataclasses import dataclass

from ..errors import check
from .feed_forward import ConvolutionPlan, FeedForward


@dataclass(frozen=True)
class SmallCnn(FeedForward):
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

    def plan(self, height: int, width: int) -> tuple[list[ConvolutionPlan], list[int], bool]:
        convolutions = [ConvolutionPlan(features, 4, 2, 1) for features in (self.width, 2 * self.width)]
        return convolutions, [self.hidden], self.batch_norm
