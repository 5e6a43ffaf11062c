"""The base of adversarial training: one attack, the passes of a step, and a criterion of their logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attacks import Attack, AttackResult, CrossEntropy, Objective, attack_field, default_attack
from ...bounds import PerturbationSet
from ...config import added
from ...labels import check_logits
from ...step import Batch, StateSpec, Step
from ..base import Loss, LossTerms
from .statistics import Passed, moving


@dataclass(frozen=True)
class Passes:
    """Results of the forward passes of one step, with their gradients.

    Args:
        labels: (B,) int64.
        adversarial: (B, K) logits of the adversarial images.
        clean: (B, K) logits of the clean images, where the method needs them.
        images: (B, *shape) the adversarial images.
        others: further logits (B, K) by name.
        penalties: 0-d terms that the criterion adds, by name, with their weights.
        weights: (B,) weights of the samples in the accuracy term's mean; None for 1.
    """

    labels: Tensor
    adversarial: Tensor
    clean: Tensor | None
    images: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None

    @property
    def clean_logits(self) -> Tensor:
        """``clean``, for methods that need it (``needs_clean``)."""
        assert self.clean is not None
        return self.clean


CLEAN_FIRST: tuple[Passed, ...] = ("clean", "adversarial")
CLEAN_LAST: tuple[Passed, ...] = ("adversarial", "clean")

Term = Literal["adversarial", "clean"]
Accuracy = Callable[[Passes, Step], Tensor]
"""(B,): the accuracy term of each sample."""


@dataclass(frozen=True)
class AdversarialLoss(Loss):
    """A loss on adversarial examples, in three parts that other code can call separately.

    ``attacked`` finds the examples; ``passes`` does everything that needs the network; ``criterion`` is a function of
    logits alone. A weight perturbation repeats the last two, a certified loss mixes bounds into the logits, and QUB
    replaces the accuracy term.
    """

    @property
    def term(self) -> Term | None:
        """The logits whose cross-entropy is the accuracy term: adversarial or clean; None where the accuracy term is no
        cross-entropy, so that no quadratic upper bound can replace it."""
        return "adversarial"

    @property
    def second_derivatives(self) -> bool:
        """Whether the loss differentiates gradients."""
        return False

    @property
    def may_be_negative(self) -> bool:
        return False

    @property
    def needs_clean(self) -> bool:
        """Whether the clean images are passed through the network, with gradient."""
        return self.term == "clean"

    @property
    def statistics(self) -> tuple[Passed, ...]:
        """The training passes that move running batch statistics, in order; empty for those that the loss makes."""
        return ()

    @abstractmethod
    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> AttackResult:
        """Attack the batch: the adversarial images, and the trace that the attack recorded."""

    @abstractmethod
    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        """Pass the attack's result through the network."""

    @abstractmethod
    def criterion(self, passes: Passes, step: Step, accuracy: Accuracy | None = None) -> Tensor:
        """The loss (0-d) as a function of the passes' logits; ``accuracy`` replaces the accuracy term."""

    def given(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult) -> LossTerms:
        """The loss for a known result of the attack."""
        clean = None
        if self.needs_clean:
            with moving(model, self.statistics, CLEAN_FIRST, "clean"):
                clean = model(batch.images)
        passes = self.passes(model, batch, step, found, clean)
        if clean is None and "clean" in self.statistics:
            with moving(model, self.statistics, CLEAN_LAST, "clean"), torch.no_grad():
                model(batch.images)
        check_logits(passes.adversarial, batch.labels)
        total = self.criterion(passes, step)
        return LossTerms(total, {name: part.detach() for name, part in reported(passes).items()})

    def __call__(self, model: nn.Module, batch: Batch, step: Step) -> LossTerms:
        return self.given(model, batch, step, self.attacked(model, batch, step))


@dataclass(frozen=True)
class AdversarialTraining(AdversarialLoss):
    """The cross-entropy of adversarial images: mean CE(f(x'), y) (Madry et al., arXiv 1706.06083).

    Methods that differ only in their attack are subclasses with another default.

    Args:
        attack: any attack of the library; null for the set's default (``default_attacks``), which keeps no state.
        statistics: the passes of ``clean`` and ``adversarial`` images behind the attack that move running batch
            statistics, in order; empty for one of each that the loss passes. It changes evaluations alone: a repeated
            pass is not computed, its kind moves them further at once; one that the loss does not make is, without
            gradient. Released TRADES passes clean, adversarial and clean images.
    """

    attack: Attack | None = attack_field("adversarial_training")
    statistics: tuple[Passed, ...] = added(())  # type: ignore[override]

    @property
    def objective(self) -> Objective:
        """The objective that the attack maximises, unless the attack has its own."""
        return CrossEntropy()

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return {} if self.attack is None else self.attack.declare_state(shape, classes)

    def check_ball(self, ball: PerturbationSet) -> None:
        self.attack_over(ball).check_ball(ball, "loss.attack")

    def attack_over(self, ball: PerturbationSet) -> Attack:
        return self.attack or default_attack(ball, "adversarial_training")

    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> AttackResult:
        return self.attack_over(step.ball).toward(self.objective)(model, batch, step.ball, step)

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        with moving(model, self.statistics, CLEAN_LAST if clean is None else CLEAN_FIRST, "adversarial"):
            adversarial = model(found.images)
        return Passes(batch.labels, adversarial, clean, found.images)

    def accuracy(self, passes: Passes, step: Step) -> Tensor:
        """(B,) the cross-entropy that ``term`` names."""
        logits = passes.clean_logits if self.term == "clean" else passes.adversarial
        return F.cross_entropy(logits, passes.labels, reduction="none")

    def criterion(self, passes: Passes, step: Step, accuracy: Accuracy | None = None) -> Tensor:
        losses = (accuracy or self.accuracy)(passes, step)
        total = (losses if passes.weights is None else passes.weights * losses).mean()
        for penalty in (*passes.penalties.values(), *self.regularisers(passes, step).values()):
            total = total + penalty
        return total

    def regularisers(self, passes: Passes, step: Step) -> Mapping[str, Tensor]:
        """The 0-d terms added to the accuracy term, by name, with their weights; functions of the logits."""
        return {}


@dataclass(frozen=True)
class Wrapper(AdversarialLoss):
    """A method that changes another one's criterion and keeps its attack and passes."""

    base: AdversarialLoss = AdversarialTraining()

    @property
    def term(self) -> Term | None:
        return self.base.term

    @property
    def statistics(self) -> tuple[Passed, ...]:
        return self.base.statistics

    @property
    def second_derivatives(self) -> bool:
        return self.base.second_derivatives

    @property
    def may_be_negative(self) -> bool:
        return self.base.may_be_negative

    @property
    def needs_clean(self) -> bool:
        return True

    @property
    def replays(self) -> int:
        return self.base.replays

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return self.base.declare_state(shape, classes)

    def files(self) -> Mapping[str, str]:
        return self.base.files()

    def check_model(self, model: nn.Module) -> None:
        self.base.check_model(model)

    def check_ball(self, ball: PerturbationSet) -> None:
        self.base.check_ball(ball)

    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> AttackResult:
        return self.base.attacked(model, batch, step)

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        return self.base.passes(model, batch, step, found, clean)


@torch.no_grad()
def reported(passes: Passes) -> dict[str, Tensor]:
    """Losses and accuracies of the passes, for progress and ``metrics.jsonl``."""
    correct = passes.adversarial.argmax(1) == passes.labels
    parts = {
        "adversarial_loss": F.cross_entropy(passes.adversarial, passes.labels),
        "attacked_accuracy": correct.float().mean(),
    }
    if passes.clean is not None:
        parts["clean_loss"] = F.cross_entropy(passes.clean, passes.labels)
        parts["clean_accuracy"] = (passes.clean.argmax(1) == passes.labels).float().mean()
    return {**parts, **passes.penalties}
