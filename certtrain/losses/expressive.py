"""The base of expressive losses, which combine an adversarial loss with that of the bounds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds import Activity, Forward, PerturbationSet, Statistics, forward
from ..errors import check
from ..step import Batch, StateSpec, Step
from .adversarial import AdversarialLoss, Passes
from .base import Ramp, check_share, value_at
from .certified import AttackedLoss, attacked_parts, margin_loss, margins_of, verified_parts


def mean_margin_loss(margins: Tensor) -> Tensor:
    return margin_loss(margins).mean()


@dataclass(frozen=True)
class ExpressiveLoss(AttackedLoss):
    """A loss between an attack's (alpha = 0) and the bounds' (alpha = 1); De Palma et al., arXiv 2305.13991.

    Args:
        alpha: 0 for the adversarial loss, 1 for the bounds', constant or along the ramp.
        adversarial: the method of adversarial training that supplies the adversarial loss; null for the cross-entropy
            of ``attack``'s images. With a method ``attack`` is ignored: the method has its own.
    """

    alpha: float | Ramp = 0.5
    adversarial: AdversarialLoss | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("alpha", self.alpha)
        moved = () if self.adversarial is None else self.adversarial.statistics
        check(not moved, "adversarial.statistics", moved, "an empty list: the order of passes is this loss' own")

    @abstractmethod
    def combine(
        self, adversarial: Tensor, verified: Tensor, alpha: float, loss: Callable[[Tensor], Tensor] = mean_margin_loss
    ) -> Tensor:
        """Combine margins under attack and lower bounds of margins, each (B, K - 1), into the loss (0-d).

        Args:
            loss: the adversarial loss (0-d) as a function of margins.
        """

    @property
    def replays(self) -> int:
        return 1 if self.adversarial is None else self.adversarial.replays

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        if self.adversarial is not None:
            return self.adversarial.declare_state(shape, classes)
        return super().declare_state(shape, classes)

    def files(self) -> Mapping[str, str]:
        return {} if self.adversarial is None else self.adversarial.files()

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        if self.adversarial is not None:
            self.adversarial.check_model(model)

    def check_ball(self, ball: PerturbationSet) -> None:
        if self.adversarial is None:
            super().check_ball(ball)
        else:
            self.adversarial.check_ball(ball)

    def clean_gradient(self, step: Step) -> bool:
        return super().clean_gradient(step) or (self.adversarial is not None and self.adversarial.needs_clean)

    def robust(self, model: nn.Module, batch: Batch, step: Step, clean: Forward) -> tuple[Tensor, dict, Activity]:
        if self.adversarial is not None:
            return self._robust(self.adversarial, model, batch, step, clean)
        adversarial = self.adversarial_pass(model, self.attacked(model, batch, step), clean)
        verified, activity = self.bound(model, batch, step, adversarial.statistics)
        margins = margins_of(adversarial.logits, batch.labels)
        parts = attacked_parts(margins) | verified_parts(verified)
        return self.combine(margins, verified, value_at(self.alpha, step)), parts, activity

    def _robust(
        self, method: AdversarialLoss, model: nn.Module, batch: Batch, step: Step, clean: Forward
    ) -> tuple[Tensor, dict, Activity]:
        wide = replace(step, ball=step.ball.scaled(self.attack_epsilon_factor))
        network = _Recorded(model, clean.statistics if self.bn_mode == "clean" else None, method.second_derivatives)
        found = method.attacked(model, batch, wide)
        passes = method.passes(network, batch, wide, found, clean.logits if method.needs_clean else None)
        verified, activity = self.bound(model, batch, step, network.statistics_of(passes.adversarial))
        margins = margins_of(passes.adversarial, batch.labels)

        def loss(margins: Tensor) -> Tensor:
            return method.criterion(replace(passes, adversarial=_with_margins(passes, margins)), wide)

        total = self.combine(margins, verified, value_at(self.alpha, step), loss)
        parts = attacked_parts(margins) | verified_parts(verified)
        return total, parts, activity


class _Recorded(nn.Module):
    """A model that records the batch statistics of each forward pass."""

    def __init__(self, model: nn.Module, statistics: Statistics | None, twice: bool):
        super().__init__()
        self.model, self.statistics, self.twice = model, statistics, twice
        self.seen: list[Forward] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(forward(self.model, images, self.statistics, twice=self.twice))
        return self.seen[-1].logits

    def statistics_of(self, logits: Tensor) -> Statistics:
        return next(run.statistics for run in self.seen if run.logits is logits)


def _with_margins(passes: Passes, margins: Tensor) -> Tensor:
    """(B, K) logits with these margins (B, K - 1); the label's entry is that of the adversarial logits."""
    own = passes.adversarial.gather(1, passes.labels[:, None])
    wrong = F.one_hot(passes.labels, passes.adversarial.shape[1]) == 0
    return own.expand_as(passes.adversarial).masked_scatter(wrong, own - margins)
