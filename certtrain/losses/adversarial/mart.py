from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attacks import Ascent, Attack
from ...step import Step
from ..base import Ramp, check_least, value_at
from .base import AdversarialTraining, Passes


@dataclass(frozen=True)
class Mart(AdversarialTraining):
    """MART: samples whose clean prediction is unsure get larger weights (Wang et al., ICLR 2020, "Improving Adversarial
    Robustness Requires Revisiting Misclassified Examples").

    With p = softmax f(x) and q = softmax f(x'): mean of -log q_y - log(1.0001 - max over k ≠ y of q_k + 1e-12)
    + weight · KL(p || q) · (1.0000001 - p_y), where KL reads log(q + 1e-12). Gradients flow through all of it, the
    last factor included. The accuracy term is no cross-entropy; it goes down to -1e-4 where q is certain.

    Args:
        weight: lambda; 5 is the released scripts', 6 their function's default.
    """

    attack: Attack | None = Ascent(attack_mode="eval", steps=10, step_size=0.25, start="normal", start_scale=1e-3)
    weight: float | Ramp = 5.0

    @property
    def term(self) -> None:
        return None

    def __post_init__(self) -> None:
        check_least("weight", self.weight)

    @property
    def needs_clean(self) -> bool:
        return True

    @property
    def may_be_negative(self) -> bool:
        return True

    def accuracy(self, passes: Passes, step: Step) -> Tensor:
        """(B,) boosted cross-entropy."""
        probabilities = F.softmax(passes.adversarial, 1)
        others = probabilities.scatter(1, passes.labels[:, None], -1.0)
        runner_up = others.max(1).values
        margin = torch.log(1.0001 - runner_up + 1e-12)
        return F.cross_entropy(passes.adversarial, passes.labels, reduction="none") - margin

    def regularisers(self, passes: Passes, step: Step) -> Mapping[str, Tensor]:
        logarithms = F.log_softmax(passes.clean_logits, 1)
        clean = logarithms.exp()
        adversarial = torch.log(F.softmax(passes.adversarial, 1) + 1e-12)
        divergence = (clean * (logarithms - adversarial)).sum(1)
        unsure = 1.0000001 - clean.gather(1, passes.labels[:, None]).squeeze(1)
        return {"divergence": value_at(self.weight, step) * (divergence * unsure).mean()}
