from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...attacks import Ascent, Attack, Divergence, KullbackLeibler, Objective
from ...errors import check
from ...step import Step
from ..base import Ramp, check_least, value_at
from .base import AdversarialTraining, Passes, Term

ATTACK = Ascent(attack_mode="eval", steps=10, step_size=0.25, start="normal", start_scale=1e-3)
"""The attack of TRADES and its relatives, on the loss' own divergence. FAIT's source and HAT take steps of 1/4; the
code of TRADES, MART, GAIRAT and friendly training takes 7/31 (0.007 in a radius of 0.031), as their recipes here do."""


@dataclass(frozen=True)
class Trades(AdversarialTraining):
    """TRADES: mean CE(f(x), y) + weight · Δ(f(x), f(x')) (Zhang et al., arXiv 1901.08573).

    Gradients flow through both arguments of the divergence, which the attack maximises too. Its start is clipped to
    valid images.

    Args:
        divergence: KL, as published, or any other Bregman divergence.
        weight: lambda, also called beta.
    """

    attack: Attack | None = ATTACK
    divergence: Divergence = KullbackLeibler()
    weight: float | Ramp = 6.0

    @property
    def term(self) -> Term | None:
        return "clean"

    def __post_init__(self) -> None:
        check_least("weight", self.weight)
        attack = self.attack
        if isinstance(attack, Ascent) and (attack.objective is None or isinstance(attack.objective, Divergence)):
            at_image = attack.start == "zero" or attack.start_scale == 0
            check(not at_image, "attack.start", attack.start, "a start off the image, where divergences are flat")

    @property
    def objective(self) -> Objective:
        return self.divergence

    def regularisers(self, passes: Passes, step: Step) -> Mapping[str, Tensor]:
        distance = self.divergence.between(passes.clean_logits, passes.adversarial).mean()
        return {"divergence": value_at(self.weight, step) * distance}
