"""Selection of the best epoch's weights on the validation split, never on test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..attacks import Attack, attack_field, default_attack
from ..bounds import PerturbationSet
from ..data import Split
from ..errors import check
from .evaluation import attacked_accuracy

SCORE = "validation_attacked_accuracy"


@dataclass(frozen=True)
class Select:
    """Keep the weights with the highest accuracy under attack on validation images, as ``best.safetensors``.

    Args:
        every: epochs between two candidates; the last epoch is always one.
        attack: null for the set's default: PGD-10, for a sparse set sPGD-20. Run at the recipe's own epsilon.
        images: number of validation images, from the first on; null for all.
    """

    every: int = 1
    attack: Attack | None = attack_field("accuracy")
    images: int | None = None

    def __post_init__(self) -> None:
        check(self.every >= 1, "every", self.every, "a number of epochs >= 1")
        check(self.images is None or self.images >= 1, "images", self.images, "a whole number >= 1, or null")
        harmless = self.attack is None or self.attack.attack_mode != "train"
        check(harmless, "attack", self.attack, "an attack_mode that leaves running statistics alone: not train")

    def attack_over(self, ball: PerturbationSet) -> Attack:
        return self.attack or default_attack(ball, "accuracy")


@dataclass
class Best:
    """The best candidate so far: the earliest with the highest score."""

    score: float = -1.0
    epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def consider(
        self, settings: Select, model: nn.Module, split: Split, ball: PerturbationSet, seed: int, epoch: int
    ) -> float:
        """Measure the weights after ``epoch`` epochs, keep a copy if they are the best, and return their score."""
        score = attacked_accuracy(model, split, ball, settings.attack_over(ball), seed, settings.images)
        if score > self.score:
            self.score, self.epoch = score, epoch
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return score

    def restore(self, state: Mapping[str, Any]) -> None:
        self.score, self.epoch, self.weights = state["score"], state["epoch"], dict(state["weights"])
