from dataclasses import dataclass

from ...attacks import Ascent, Attack
from .base import AdversarialTraining


@dataclass(frozen=True)
class NFgsm(AdversarialTraining):
    """N-FGSM: one step of size epsilon from uniform noise of twice that size, not projected (arXiv 2202.01181).

    The images may lie (start_scale + 1) epsilon away, 3 epsilon by default.
    """

    attack: Attack | None = Ascent(
        attack_mode="train", steps=1, step_size=1.0, start="uniform", start_scale=2.0, projected=False
    )
