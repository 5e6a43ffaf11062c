from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ...attacks import Ascent, Attack, Divergence, SquaredEuclidean
from ...step import Step
from ..base import Ramp
from .base import Passes
from .trades import Trades


@dataclass(frozen=True)
class Score(Trades):
    """SCORE: squared distances of probabilities in both terms, |f(x) - y|² + weight · |f(x') - f(x)|² (Pang et al.,
    arXiv 2202.10103).

    The accuracy term is no cross-entropy. TRADES with ``divergence: {type: SquaredEuclidean}`` keeps the cross-entropy.
    """

    attack: Attack | None = Ascent(attack_mode="batch", steps=10, step_size=0.25, start="uniform")
    divergence: Divergence = SquaredEuclidean()
    weight: float | Ramp = 4.0

    @property
    def term(self) -> None:
        return None

    @property
    def needs_clean(self) -> bool:
        return True

    def accuracy(self, passes: Passes, step: Step) -> Tensor:
        target = F.one_hot(passes.labels, passes.clean_logits.shape[1])
        return (F.softmax(passes.clean_logits, 1) - target).square().sum(1)
