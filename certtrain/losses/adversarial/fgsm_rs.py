from dataclasses import dataclass

from ...attacks import Ascent, Attack
from .base import AdversarialTraining


@dataclass(frozen=True)
class FgsmRs(AdversarialTraining):
    """FGSM-RS, also called Fast-AT: one step of 1.25 epsilon from a uniform start (Wong et al., arXiv 2001.03994)."""

    attack: Attack | None = Ascent(attack_mode="train", steps=1, step_size=1.25, start="uniform")
