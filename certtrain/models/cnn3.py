from dataclasses import dataclass

from ..errors import check
from .feed_forward import ConvolutionPlan, FeedForward


@dataclass(frozen=True)
class Cnn3(FeedForward):
    """Two convolutions of stride 2 (w 5×5, 2w 4×4) and a linear layer (K): CTBench's cnn_3layer.

    Width 16: 24 330 parameters for MNIST, 29 930 for CIFAR-10, with batch norm 24 426 and 30 026. Width 64 with batch
    norm is CTRAIN's CNN3. cnn_4layer: hidden 512; ConvMed: width 32, growth 4, hidden 250, no batch norm.

    Args:
        width: channels of the first convolution.
        growth: factor of the channels from the first convolution to the second.
        hidden: features of a linear layer before the last one; null for none.
        batch_norm: after every layer but the last.
    """

    width: int = 16
    growth: int = 2
    hidden: int | None = None
    batch_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "growth"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "a whole number >= 1")
        check(self.hidden is None or self.hidden >= 1, "hidden", self.hidden, "a whole number >= 1, or null")

    def plan(self, height: int, width: int) -> tuple[list[ConvolutionPlan], list[int], bool]:
        convolutions = [ConvolutionPlan(self.width, 5, 2, 2), ConvolutionPlan(self.growth * self.width, 4, 2, 1)]
        return convolutions, [] if self.hidden is None else [self.hidden], self.batch_norm
