from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ...step import Step
from ..base import Ramp, check_share, value_at
from .base import AdversarialTraining, Passes, Term


@dataclass(frozen=True)
class TradeOff(AdversarialTraining):
    """The trade-off loss: mean (1 - weight) · CE(f(x), y) + weight · CE(f(x'), y) (Goodfellow et al., arXiv 1412.6572).

    Its gradient varies less with the weights than that of CE(f(x'), y) alone (Zhong et al., NeurIPS 2025, theorem 4.2).

    Args:
        weight: alpha, the weight of the adversarial images: 3/4 in their tables.
    """

    weight: float | Ramp = 0.75

    def __post_init__(self) -> None:
        check_share("weight", self.weight)

    @property
    def term(self) -> Term | None:
        return None

    @property
    def needs_clean(self) -> bool:
        return True

    def accuracy(self, passes: Passes, step: Step) -> Tensor:
        clean, adversarial = (
            F.cross_entropy(logits, passes.labels, reduction="none")
            for logits in (passes.clean_logits, passes.adversarial)
        )
        weight = value_at(self.weight, step)
        return (1 - weight) * clean + weight * adversarial
