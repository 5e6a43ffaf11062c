from dataclasses import dataclass

from torch import Tensor

from ..bounds import NormBall
from .ascent import Ascent


@dataclass(frozen=True)
class Linearisation(Ascent):
    """One step along the gradient itself, not its sign: Fast-BAT's point of linearisation.

    Args:
        step_size: factor of the gradient of the batch's *summed* objective, in pixel units.
    """

    steps: int = 1
    step_size: float = 5000 / 255

    def move(self, images: Tensor, points: Tensor, gradient: Tensor, ball: NormBall) -> Tensor:
        return self.bounded(images, points + self.step_size * gradient, ball)
