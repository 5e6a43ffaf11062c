from dataclasses import dataclass

from ...attacks import Ascent, Attack
from .base import AdversarialTraining


@dataclass(frozen=True)
class Pgd2At(AdversarialTraining):
    """PGD-2-AT: two steps of epsilon / 2 from a uniform start, a baseline of Fast-BAT (arXiv 2112.12376)."""

    attack: Attack | None = Ascent(attack_mode="train", steps=2, step_size=0.5, start="uniform")
