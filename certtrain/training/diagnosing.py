"""Diagnostics along training: off by default, changes nothing."""

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
    """Diagnostics on images spread evenly over the training split, as stored, at the recipe's own epsilon.

    Each is a line of ``metrics.jsonl`` with ``"kind": "diagnosis"``: numbers, lists, and null for the mean of nothing.

    Args:
        every: epochs between two of them.
        images: how many; of a smaller split all.
        what: some of ``certtrain.diagnostics.DIAGNOSTICS``; null for alignment, cosine, qub and split, over a sparse
            set for qub and interpolation. Landscapes, Hessians, ``overlap`` and ``gradient_gap`` cost as much as an
            epoch or more.
        attack: the strong one, which one step is compared with and QUB is measured at; null for the set's default:
            PGD-10, of a sparse set sPGD-20 (for ``overlap`` sPGD-100).
        top: eigenvalues of ``hessian`` and ``adversarial_hessian``.
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

    def asked(self, ball: PerturbationSet) -> list[str]:
        """The names, for a recipe with such a set.

        Raises:
            InputError: one of those that were asked for does not know it.
        """
        names = usual(ball) if self.what is None else list(self.what)
        check_balls("training.diagnose.what", names, ball)
        return names

    def __call__(self, model: nn.Module, split: Split, ball: PerturbationSet, seed: int) -> dict[str, Any]:
        """Diagnose; the model's mode, its buffers and gradients, and torch's generator stay as they are."""
        batch = spread(split, self.images)
        subject = Subject(model, batch, ball, Noise(key_of(seed, "diagnose"), batch.index), self.attack, self.top)
        found: dict[str, Any] = {"images": len(batch)}
        for name in self.asked(ball):
            found |= DIAGNOSTICS[name](subject)
        return found
