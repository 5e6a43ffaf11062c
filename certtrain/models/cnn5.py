from dataclasses import dataclass

from ..errors import check
from .feed_forward import ConvolutionPlan, FeedForward


@dataclass(frozen=True)
class Cnn5(FeedForward):
    """Three convolutions (w 3×3; w and 2w 4×4 with stride 2) and two linear layers (512, K): CTBench's cnn_5layer.

    Width 16: 820 954 parameters for MNIST, 1 067 002 for CIFAR-10, with batch norm 822 106 and 1 068 154. Width 64 with
    batch norm is CTRAIN's CNN5. ConvMedBig: width 32, growth 4, hidden 250, no batch norm.

    Args:
        width: channels of the first and second convolution.
        growth: factor of the channels from the second convolution to the third.
        hidden: features of the first linear layer.
        batch_norm: after every layer but the last.
    """

    width: int = 16
    growth: int = 2
    hidden: int = 512
    batch_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "growth", "hidden"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "a whole number >= 1")

    def plan(self, height: int, width: int) -> tuple[list[ConvolutionPlan], list[int], bool]:
        first, second = ConvolutionPlan(self.width, 3, 1, 1), ConvolutionPlan(self.width, 4, 2, 1)
        return [first, second, ConvolutionPlan(self.growth * self.width, 4, 2, 1)], [self.hidden], self.batch_norm
