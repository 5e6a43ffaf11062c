from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attacks import AttackResult
from ...errors import check
from ...step import Batch, StateSpec, Step
from .base import Accuracy, AdversarialLoss, AdversarialTraining, Passes, Term, Wrapper
from .trade_off import TradeOff

KEPT = "soft_labels"
TARGETS = "targets"


@dataclass(frozen=True)
class SelfAdaptive(Wrapper):
    """Self-adaptive training: soft labels that follow the network's own predictions (Huang et al., arXiv 2002.10319).

    Each training sample has a label t, one-hot at first. From epoch ``start`` on each visit replaces it by
    momentum · t + (1 - momentum) · softmax(f(x)), and the base's cross-entropies of clean and adversarial images are
    taken with t and weighted by w = max_j t_j: sum w CE / sum w, with ``training.accumulate`` over each part. Before
    ``start`` this is the base. Regularisers such as a divergence keep their weight. An attack on the cross-entropy uses
    t from before the visit.

    Where the base does not pass the clean images through the network, f(x) is taken at the adversarial ones: our
    choice, the sources do not say.

    Args:
        base: a method whose accuracy term is a cross-entropy: ``AdversarialTraining``, ``TradeOff``, ``Trades``.
        momentum: the share of t that a visit keeps.
        start: epochs with one-hot labels; half of the training as published for l0 (Zhong et al., NeurIPS 2025).
    """

    base: AdversarialLoss = AdversarialTraining()
    momentum: float = 0.9
    start: int = 50

    def __post_init__(self) -> None:
        known = (AdversarialTraining.accuracy, TradeOff.accuracy)
        soft = isinstance(self.base, AdversarialTraining) and type(self.base).accuracy in known
        check(soft, "base.type", type(self.base).__name__, "a method whose accuracy term is a plain cross-entropy")
        check(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        check(self.start >= 0, "start", self.start, "a number of epochs >= 0")

    @property
    def term(self) -> Term | None:
        return None

    @property
    def needs_clean(self) -> bool:
        return self.base.needs_clean

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        # a row of zeros, which is no distribution, marks a sample without a visit: its label is one-hot
        return {**self.base.declare_state(shape, classes), KEPT: StateSpec("sample", (classes,))}

    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> AttackResult:
        if step.epoch < self.start or KEPT not in step.state.tensors:
            return self.base.attacked(model, batch, step)
        before = soft_labels(step.state.read(KEPT, batch), batch.labels)
        found = self.base.attacked(model, replace(batch, targets=before), step)
        return replace(found, trace={**found.trace, TARGETS: before})

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        passes = self.base.passes(model, batch, step, found, clean)
        if TARGETS not in found.trace:
            return passes
        seen = passes.adversarial if passes.clean is None else passes.clean
        share = 1 - self.momentum
        # from t as the attack saw it: a weight perturbation calls this twice in one visit
        after = self.momentum * found.trace[TARGETS] + share * F.softmax(seen.detach(), 1).to(torch.float32)
        step.state.write(KEPT, batch, after)
        return replace(passes, others={**passes.others, TARGETS: after})

    def criterion(self, passes: Passes, step: Step, accuracy: Accuracy | None = None) -> Tensor:
        targets = passes.others.get(TARGETS)
        if targets is None or accuracy is not None:
            return self.base.criterion(passes, step, accuracy)

        def soft(passes: Passes, step: Step) -> Tensor:
            assert isinstance(self.base, AdversarialTraining)
            labels = targets.to(passes.adversarial.dtype)
            weights = labels.amax(1)
            return weights / weights.mean() * self.base.accuracy(replace(passes, labels=labels), step)

        return self.base.criterion(passes, step, soft)


def soft_labels(kept: Tensor, labels: Tensor) -> Tensor:
    """(B, K): each sample's stored label (B, K), or its one-hot label where none is stored."""
    return torch.where(kept.sum(1, keepdim=True) > 0, kept, F.one_hot(labels, kept.shape[1]).to(kept.dtype))
