from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ...attacks import Ascent, AttackResult
from ...errors import check
from ...step import Batch, Step
from ..base import Ramp, value_at
from .base import Passes
from .trades import ATTACK, Trades


@dataclass(frozen=True)
class Fait(Trades):
    """FAIT: TRADES with its divergence split at an early iterate x* of the attack ("Bregman" paper of FAIT and MER).

    mean CE(f(x), y) + weight · (Δ(f(x), f(x*)) + Δ(f(x*), f(x'))). On the segment between two distributions the split
    is never larger than the whole (a lemma on Bregman divergences); iterates of PGD do not lie on one, so for them it
    holds on average, not always.

    Args:
        index: I, the number of attack steps after which x* is taken.
    """

    attack: Ascent = ATTACK
    weight: float | Ramp = 12.0
    index: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            1 <= self.index < self.attack.steps, "index", self.index, f"1 to attack.steps - 1 = {self.attack.steps - 1}"
        )

    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> AttackResult:
        attack = replace(self.attack, record=self.index)
        return attack.toward(self.objective)(model, batch, step.ball, step)

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        middle = model(found.trace["iterate"])
        return replace(super().passes(model, batch, step, found, clean), others={"middle": middle})

    def regularisers(self, passes: Passes, step: Step) -> Mapping[str, Tensor]:
        middle = passes.others["middle"]
        first = self.divergence.between(passes.clean_logits, middle).mean()
        second = self.divergence.between(middle, passes.adversarial).mean()
        return {"divergence": value_at(self.weight, step) * (first + second)}
