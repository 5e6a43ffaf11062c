from dataclasses import dataclass

from ...attacks import Ascent, Attack
from .base import AdversarialTraining


@dataclass(frozen=True)
class Fgsm(AdversarialTraining):
    """One step of size epsilon from the image itself (Goodfellow et al., arXiv 1412.6572).

    Prone to catastrophic overfitting: accuracy under stronger attacks may fall to 0 within an epoch.
    """

    attack: Attack | None = Ascent(attack_mode="train", steps=1, step_size=1.0, start="zero")
