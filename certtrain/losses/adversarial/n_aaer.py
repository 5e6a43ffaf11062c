from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attacks import RECORDING, Ascent, Attack, AttackResult, records_start
from ...errors import check
from ...step import Batch, Step
from ..base import Ramp, check_least, value_at
from .base import AdversarialTraining, Passes

_N_FGSM = Ascent(attack_mode="train", steps=1, step_size=1.0, start="uniform", start_scale=2.0, projected=False)


@dataclass(frozen=True)
class NAaer(AdversarialTraining):
    """N-AAER: N-FGSM with a penalty on abnormal examples, whose loss the attack lowered (Lin et al., NeurIPS 2023,
    arXiv 2404.08154).

    With s the attack's start, A = {CE(f(s), y) > CE(f(x'), y)}, N the other samples, and V the mean over a set of
    |f(s) - f(x')|² with f(s) constant: mean CE(f(x'), y) + weight · |A| / B · (loss_weight · mean over A of
    (CE(f(s), y) - CE(f(x'), y)) + logit_weight · max(V_A - V_N, 0)), V_N constant too. Where A or N is empty the
    penalty is 0. With ``training.accumulate`` both are formed within each part.

    RS-AAER: ``attack: {step_size: 1.25, start_scale: 1, projected: true}`` and its own weights.

    Over a sparse set the attack is ``{type: SparsePgd, steps: 1, alpha: 1, beta: 1, patience: null, keep: last}``, and
    its random start is s.

    Args:
        attack: one that records its start.
        weight, loss_weight, logit_weight: lambda 1 to 3. Published for CIFAR-10 at epsilon 8, 12, 16, 32 / 255:
            (1, 1.5, 0.15), (1, 5, 0.55), (1, 8.5, 1.5), (1, 2.75, 0.75); of RS-AAER at 8 and 16: (1, 2.5, 1.5),
            (1, 7, 3.25).
        detached: whether both losses of the ``loss_weight`` term are constants, as released: it then changes the value
            of the loss and no gradient. Otherwise f(s) is computed once more, with gradient.
    """

    attack: Attack = _N_FGSM
    weight: float | Ramp = 1.0
    loss_weight: float = 1.5
    logit_weight: float = 0.15
    detached: bool = True

    def __post_init__(self) -> None:
        check(records_start(self.attack), "attack.type", type(self.attack).__name__, RECORDING)
        check_least("weight", self.weight)
        check_least("loss_weight", self.loss_weight)
        check_least("logit_weight", self.logit_weight)

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        start = found.trace["logits"] if self.detached else model(found.trace["start"])
        return replace(super().passes(model, batch, step, found, clean), others={"start": start})

    def regularisers(self, passes: Passes, step: Step) -> Mapping[str, Tensor]:
        start, reached = passes.others["start"], passes.adversarial
        before, after = (F.cross_entropy(logits, passes.labels, reduction="none") for logits in (start, reached))
        abnormal = before.detach() > after.detach()
        drop = before - after
        moved = (start.detach() - reached).square().sum(1)
        further = _mean(moved, abnormal) - _mean(moved, ~abnormal).detach()
        penalty = self.loss_weight * _mean(drop.detach() if self.detached else drop, abnormal)
        penalty = penalty + self.logit_weight * further.clamp(min=0)
        share = abnormal.to(penalty.dtype).mean()
        return {"abnormal": value_at(self.weight, step) * torch.where((0 < share) & (share < 1), share * penalty, 0)}


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean (0-d) over the chosen samples (B,); 0 with gradient 0 where none is chosen."""
    return torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)
