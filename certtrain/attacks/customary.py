"""What searches for misclassified images where nobody says what should."""

from ..bounds import L1Ball, PerturbationSet, SparseBall
from .base import Attack
from .frank_wolfe import FrankWolfe
from .sparse import SparsePgd


def customary(attack: Attack, default: Attack, ball: PerturbationSet, steps: int) -> Attack:
    """``attack``; but where it is only the ``default``, which is made for l_inf and l2 balls, so many steps of sPGD in
    a sparse set, of Frank and Wolfe in an l1 ball."""
    if attack != default:
        return attack
    match ball:
        case SparseBall():
            return SparsePgd(steps=steps)
        case L1Ball():
            return FrankWolfe(steps=steps)
        case _:
            return attack
