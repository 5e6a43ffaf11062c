from dataclasses import dataclass

from ..errors import InputError, check
from .feed_forward import ConvolutionPlan, FeedForward

SIDES = (28, 32, 64)


@dataclass(frozen=True)
class Cnn7(FeedForward):
    """CNN7 as published, for 28×28, 32×32 and 64×64 images (Shi et al., arXiv 2103.17268; arXiv 2305.13991).

    Five 3×3 convolutions (64, 64, 128 with stride 2, 128, 128) and two linear layers (512, K), each but the last with
    batch norm and ReLU: 13 259 338 parameters for MNIST, 17 192 650 for CIFAR-10. At 64×64 the fifth convolution has
    stride 2 as well: 17 290 120 parameters for TinyImageNet. Width 32 is the "narrow", 128 the "wide" CNN7; without
    batch norm it is the large net of Gowal et al. (arXiv 1810.12715) with same padding.

    Args:
        width: channels of the first convolution; 64 is the published net.
        hidden: features of the first linear layer.
        batch_norm: after every layer but the last.
        last_stride: stride of the fifth convolution; null for the published one, 1 up to 32×32 and 2 at 64×64. CTRAIN's
            nets for TinyImageNet keep 1 (67 621 768 parameters).
        more: further 3×3 convolutions (2·width, stride 1) behind the fifth: 2 for CNN9, 4 for CNN11.
    """

    width: int = 64
    hidden: int = 512
    batch_norm: bool = True
    last_stride: int | None = None
    more: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 1, "width", self.width, "a whole number >= 1")
        check(self.hidden >= 1, "hidden", self.hidden, "a whole number >= 1")
        check(self.last_stride in (None, 1, 2), "last_stride", self.last_stride, "1 or 2, or null")
        check(self.more >= 0, "more", self.more, "a whole number >= 0")

    def plan(self, height: int, width: int) -> tuple[list[ConvolutionPlan], list[int], bool]:
        if height != width or height not in SIDES:
            raise InputError(f"model.type Cnn7: found images of {height}×{width}; accepted: 28×28, 32×32 or 64×64")
        last = (2 if height == 64 else 1) if self.last_stride is None else self.last_stride
        strides = ((1, 1), (1, 1), (2, 2), (2, 1), (2, last), *[(2, 1)] * self.more)
        convolutions = [ConvolutionPlan(times * self.width, 3, stride, 1) for times, stride in strides]
        return convolutions, [self.hidden], self.batch_norm
