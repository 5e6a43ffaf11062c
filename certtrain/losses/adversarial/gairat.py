from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attacks import Ascent, AttackResult
from ...errors import check
from ...step import Batch, Step
from .base import AdversarialTraining, Passes


@dataclass(frozen=True)
class Gairat(AdversarialTraining):
    """GAIRAT: samples that are misclassified early in the attack get larger weights (Zhang et al., arXiv 2010.01736).

    mean of w · CE(f(x'), y), where w is proportional to tanh(offset + 5 (h - kappa) / h) + 1 with mean 1 over the batch
    (with ``training.accumulate`` over each part); kappa is the number of the attack's points before a step that are
    classified correctly, h half the steps, rounded down. No gradient flows into the weights.

    Args:
        begin_epoch: number of epochs with equal weights at the start; null for half of all, 60 of 120 as published. The
            authors' code has 59: it counts from 1 and begins with epoch 60.
        offset: Lambda; larger values give more even weights.
    """

    attack: Ascent = Ascent(attack_mode="eval", steps=10, step_size=0.25, start="uniform")
    begin_epoch: int | None = None
    offset: float = -1

    def __post_init__(self) -> None:
        check(self.attack.steps >= 2, "attack.steps", self.attack.steps, "a whole number >= 2, of which half are taken")
        late = self.begin_epoch is None or self.begin_epoch >= 0
        check(late, "begin_epoch", self.begin_epoch, "a whole number >= 0, or null")

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        passes = super().passes(model, batch, step, found, clean)
        if step.epoch < (step.epochs // 2 if self.begin_epoch is None else self.begin_epoch):
            return passes
        return replace(passes, weights=self.weights(found.trace["correct"]).to(passes.adversarial.dtype))

    def weights(self, correct: Tensor) -> Tensor:
        """(B,) float64 weights with mean 1, from kappa (B,) int64."""
        half = self.attack.steps // 2
        scores = self.offset + 5 * (half - correct.double()) / half
        # (tanh(s) + 1) / 2 = sigmoid(2 s), whose logarithm neither cancels nor vanishes: in float32 the formula itself
        # is 0 / 0 from an offset of -5 down, where no attack of a batch succeeds
        return len(correct) * torch.softmax(F.logsigmoid(2 * scores), 0)
