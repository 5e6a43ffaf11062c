from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ...attacks import AttackResult, Nuclear, NuclearNormAttack, nuclear_norm
from ...bounds import PerturbationSet
from ...step import Batch, Step
from ..base import Ramp, check_least, value_at
from .base import AdversarialTraining, Passes, Term


@dataclass(frozen=True)
class NuAt(AdversarialTraining):
    """NuAT: mean CE(f(x), y) + weight / B · |f(x') - f(x)|_*, the nuclear norm of a (B, K) matrix (Sriramanan et al.,
    NeurIPS 2021, "Towards Efficient and Effective Adversarial Training").

    The nuclear norm is the sum of singular values: it grows slower than linearly with the batch, so that ``weight``
    belongs to a batch size (64 as published; with ``training.accumulate`` that of a part). NuAT2 takes two steps and
    averaged weights; here every step ascends the same objective (``attack: {steps: 2}``, ``training.averaging``).

    Over a sparse set the attack is ``{type: SparseNuclear}``.

    Args:
        weight: lambda; also used by the attack, unless it has its own.
    """

    attack: NuclearNormAttack = Nuclear()
    weight: float | Ramp = Ramp(0.0, 4.5, along="training", over=0.9)

    @property
    def term(self) -> Term:
        return "clean"

    def __post_init__(self) -> None:
        check_least("weight", self.weight)

    def check_ball(self, ball: PerturbationSet) -> None:
        self.attack.check_ball(ball, "loss.attack", among=NuclearNormAttack)

    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> AttackResult:
        attack = self.attack
        if attack.weight is None:
            attack = replace(attack, weight=value_at(self.weight, step))
        return attack.toward(self.objective)(model, batch, step.ball, step)

    def regularisers(self, passes: Passes, step: Step) -> Mapping[str, Tensor]:
        norm = nuclear_norm(passes.adversarial - passes.clean_logits)
        return {"nuclear": value_at(self.weight, step) * norm / len(passes.labels)}
