from dataclasses import dataclass

from ...attacks import Ascent, Attack
from .base import AdversarialTraining


@dataclass(frozen=True)
class PgdAt(AdversarialTraining):
    """PGD-AT: ten steps of epsilon / 4 from a uniform start (Madry et al., arXiv 1706.06083).

    The attack passes are in training mode, as in the code of arXiv 2601.13645; other sources do not specify it.
    """

    attack: Attack | None = Ascent(attack_mode="train", steps=10, step_size=0.25, start="uniform")
