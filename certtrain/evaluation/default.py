"""The default attack of a perturbation set as an adversary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attacks import default_attack
from ..bounds import PerturbationSet
from ..step import Batch, Step
from .adversary import Adversary, Outcome
from .sparse import Searching


@dataclass(frozen=True)
class DefaultAttack(Adversary):
    """The attack that the verifier uses by default for the set (``default_attacks["falsify"]``), for every set."""

    @property
    def name(self) -> str:
        return "default"

    def basis(self, batch_size: int) -> dict[str, Any]:
        return {"purpose": "falsify"}

    def refuses(self, model: nn.Module | None, images: Tensor | None, ball: PerturbationSet) -> str:
        return self._over(ball).refuses(model, images, ball)

    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        return self._over(ball)(model, batch, ball, step)

    def _over(self, ball: PerturbationSet) -> Searching:
        return Searching(self.name, ((self.name, default_attack(ball, "falsify")),))
