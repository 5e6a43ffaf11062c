from dataclasses import dataclass
from typing import Literal

from ..errors import check
from .feed_forward import ConvolutionPlan, FeedForward

SIZES = {
    "small": ([ConvolutionPlan(16, 4, 2), ConvolutionPlan(32, 4, 1)], [100]),
    "medium": (
        [ConvolutionPlan(32, 3, 1), ConvolutionPlan(32, 4, 2), ConvolutionPlan(64, 3, 1), ConvolutionPlan(64, 4, 2)],
        [512, 512],
    ),
    "large": (
        [ConvolutionPlan(64, 3, 1), ConvolutionPlan(64, 3, 1), ConvolutionPlan(128, 3, 2), ConvolutionPlan(128, 3, 1),
         ConvolutionPlan(128, 3, 1)],
        [512],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Gowal(FeedForward):
    """Small, medium and large net of Gowal et al. (arXiv 1810.12715), with valid padding and without batch norm.

    Parameters for MNIST and CIFAR-10: small 329 606 and 470 918, medium 893 418 and 1 188 906, large 3 623 498 and
    5 721 802. The large net with same padding (17 190 602) is ``Cnn7(batch_norm=False)``.

    Args:
        size: small, medium or large.
    """

    size: Literal["small", "medium", "large"] = "small"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.size in SIZES, "size", self.size, ", ".join(SIZES))

    def plan(self, height: int, width: int) -> tuple[list[ConvolutionPlan], list[int], bool]:
        convolutions, hidden = SIZES[self.size]
        return convolutions, hidden, False
