from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from ...attacks import AttackResult, Objective, PriorGuided, SmoothedCrossEntropy
from ...step import Batch, Step
from ..base import Ramp, check_least, value_at
from .base import AdversarialTraining, Passes


@dataclass(frozen=True)
class FgsmPgi(AdversarialTraining):
    """FGSM-PGI with momentum over all epochs (FGSM-MEP): one step from the sample's perturbation of the last epoch (Jia
    et al., arXiv 2207.08859).

    CE(f(x + d), t) + weight · the mean, over samples and classes, of (f(x + d) - f(x + d0))², d0 the perturbation that
    the step starts from; both logits carry gradients. The attack climbs the same smoothed cross-entropy.

    Args:
        attack: by default leaves running statistics unchanged, because the loss passes x + d0 again, with gradient:
            they move twice a step, as published (three times under QUB).
        weight: multiplies the mean squared change of the logits.
        true_mass: probability that the label t gives to the true class; the others share the rest. 0.6 in the paper;
            1, the plain cross-entropy, in the code of arXiv 2601.13645. QUB bounds the plain one at any value.
    """

    attack: PriorGuided = PriorGuided(attack_mode="batch")
    weight: float | Ramp = 10.0
    true_mass: float = 0.6

    def __post_init__(self) -> None:
        check_least("weight", self.weight)
        SmoothedCrossEntropy(self.true_mass)

    @property
    def objective(self) -> Objective:
        return SmoothedCrossEntropy(self.true_mass)

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        start = model(found.trace["start"])
        passes = super().passes(model, batch, step, found, clean)
        change = F.mse_loss(passes.adversarial, start)
        return replace(passes, penalties={**passes.penalties, "guidance": value_at(self.weight, step) * change})

    def accuracy(self, passes: Passes, step: Step) -> Tensor:
        return self.objective(passes.adversarial, passes.labels)
