from dataclasses import dataclass

from ..errors import check
from .feed_forward import ConvolutionPlan, FeedForward


@dataclass(frozen=True)
class Mlp(FeedForward):
    """Linear layers with activations between them.

    Args:
        hidden: features of each hidden layer.
        batch_norm: after every layer but the last.
    """

    hidden: tuple[int, ...] = (100, 100)
    batch_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(all(width >= 1 for width in self.hidden), "hidden", self.hidden, "a list of whole numbers >= 1")

    def plan(self, height: int, width: int) -> tuple[list[ConvolutionPlan], list[int], bool]:
        return [], list(self.hidden), self.batch_norm
