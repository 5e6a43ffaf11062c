from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...attacks import Divergence, KullbackLeibler
from ...step import Step
from ..base import Ramp, check_least, value_at
from .base import Accuracy, AdversarialLoss, Passes, Wrapper
from .trades import Trades


@dataclass(frozen=True)
class Mer(Wrapper):
    """MER, maximum-entropy regularisation: base + mean(clean · ψ(f(x)) + adversarial · ψ(f(x'))).

    With KL's ψ = -H this maximises the entropy of the predictions. The source's proofs are for two classes.

    Args:
        base: any method: TRADES and FAIT as published; others are experimental.
        clean, adversarial: weights of the two potentials.
        divergence: supplies the potential ψ.
    """

    base: AdversarialLoss = Trades(weight=21.0)
    clean: float | Ramp = 1.0
    adversarial: float | Ramp = 0.0
    divergence: Divergence = KullbackLeibler()

    def __post_init__(self) -> None:
        check_least("clean", self.clean)
        check_least("adversarial", self.adversarial)

    @property
    def may_be_negative(self) -> bool:
        return True

    def criterion(self, passes: Passes, step: Step, accuracy: Accuracy | None = None) -> Tensor:
        total = self.base.criterion(passes, step, accuracy)
        for weight, logits in ((self.clean, passes.clean_logits), (self.adversarial, passes.adversarial)):
            total = total + value_at(weight, step) * self.divergence.potential(logits).mean()
        return total
