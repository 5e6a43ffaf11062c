"""What searches for misclassified images where nobody says what should."""

from ..bounds import NormBall, PerturbationSet
from .base import Attack
from .sparse import SparsePgd


def customary(attack: Attack, default: Attack, ball: PerturbationSet, steps: int) -> Attack:
    """``attack``; for a sparse set, if it is only the ``default``, sPGD with the best of so many steps."""
    return attack if attack != default or isinstance(ball, NormBall) else SparsePgd(steps=steps)
