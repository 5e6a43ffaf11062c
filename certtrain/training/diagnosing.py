"""Diagnostics along training: off by default, without effect on the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..attacks import Attack, attack_field, default_attack
from ..bounds import PerturbationSet
from ..data import Split
from ..diagnostics import DIAGNOSTICS, Subject, check_balls, check_names, spread, usual
from ..errors import check
from ..noise import Noise, key_of


@dataclass(frozen=True)
class Diagnose:
    """Diagnostics on stored images spread evenly over the training split, at the recipe's own epsilon.

    Each diagnosis is a line of ``metrics.jsonl`` with ``"kind": "diagnosis"``: numbers, lists, null for an empty mean.

    Args:
        every: epochs between two diagnoses.
        images: number of images; all of a smaller split.
        what: some of ``certtrain.diagnostics.DIAGNOSTICS``; null for alignment, cosine, qub and split, for a sparse set
            qub and interpolation. Landscapes, Hessians, ``overlap`` and ``gradient_gap`` cost as much as an epoch or
            more.
        attack: the strong attack with which one step is compared and at which QUB is measured; null for the set's
            default: PGD-10, for a sparse set sPGD-20 (for ``overlap`` sPGD-100).
        top: number of eigenvalues of ``hessian`` and ``adversarial_hessian``.
    """

    every: int = 1
    images: int = 1000
    what: tuple[str, ...] | None = None
    attack: Attack | None = attack_field("many_steps")
    top: int = 5

    def __post_init__(self) -> None:
        check(self.every >= 1, "every", self.every, "a number of epochs >= 1")
        check(self.images >= 1, "images", self.images, "a whole number >= 1")
        if self.what is not None:
            check_names("what", self.what)
        harmless = self.attack is None or self.attack.attack_mode != "train"
        check(harmless, "attack", self.attack, "an attack_mode that leaves running statistics alone: not train")
        check(self.top >= 1, "top", self.top, "a whole number >= 1")

    def attack_over(self, ball: PerturbationSet) -> Attack:
        return self.attack or default_attack(ball, "many_steps")

    def names_for(self, ball: PerturbationSet) -> list[str]:
        """The names of the diagnostics for this perturbation set.

        Raises:
            InputError: one of ``what`` does not support the set.
        """
        names = usual(ball) if self.what is None else list(self.what)
        check_balls("training.diagnose.what", names, ball)
        return names

    def __call__(self, model: nn.Module, split: Split, ball: PerturbationSet, seed: int) -> dict[str, Any]:
        """Run the diagnostics. The model's mode, buffers and gradients and torch's generator are restored."""
        batch = spread(split, self.images)
        subject = Subject(model, batch, ball, Noise(key_of(seed, "diagnose"), batch.index), self.attack, self.top)
        figures: dict[str, Any] = {"images": len(batch)}
        for name in self.names_for(ball):
            figures |= DIAGNOSTICS[name](subject)
        return figures
