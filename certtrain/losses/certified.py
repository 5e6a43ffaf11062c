"""The base of losses over bounds: the passes of one step, and the terms added to the robust loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import Attack, attack_field, default_attack
from ..bounds import (
    Activity,
    Forward,
    Interval,
    PerturbationSet,
    Statistics,
    compute_margins,
    forward,
    trace,
)
from ..bounds.output_forms import Margins
from ..errors import check
from ..labels import check_logits
from ..step import Batch, StateSpec, Step
from .base import Loss, LossTerms, Ramp, check_share, value_at
from .regularisers import l1_norm, warmup_regularisers

BnMode = Literal["adv", "clean"]
CLEAN_RADIUS = 1e-6  # the regularisers need a box while epsilon is still 0 (arXiv 2103.17268's code)


def margin_loss(margins: Tensor) -> Tensor:
    """(B,) log(1 + sum_j exp(-z_j)) of margins (B, K - 1): the cross-entropy, computed without forming the logits."""
    return torch.logsumexp(F.pad(-margins, (1, 0)), dim=1)


def _wrong_classes(labels: Tensor, classes: int) -> Tensor:
    """(B, K - 1) the classes j != y in increasing order, found without waiting for the device."""
    places = torch.arange(classes - 1, device=labels.device)
    return places + (places >= labels[:, None])


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K - 1) margins z_y - z_j of logits (B, K), columns j != y in increasing order."""
    return logits.gather(1, labels[:, None]) - logits.gather(1, _wrong_classes(labels, logits.shape[1]))


def margin_rows(labels: Tensor, logits: Tensor) -> Tensor:
    """(B, K - 1, K) linear forms e_y - e_j of logits (B, K), in the same order."""
    return Margins.of_labels(labels, logits.shape[1]).to(logits.dtype).dense()


def mix(at_zero: Tensor, at_one: Tensor, share: float) -> Tensor:
    """(1 - share) at_zero + share at_one; *exactly* the end at a share of 0 or 1 (0 · -inf would be NaN)."""
    if share == 0:
        return at_zero
    return at_one if share == 1 else share * at_one + (1 - share) * at_zero


@dataclass(frozen=True)
class CertifiedLoss(Loss):
    """A loss over interval bounds.

    Total = kappa · CE(clean) + (1 - kappa) · robust loss + l1 · sum |W| + regularisation · (1 - eps/eps_max) ·
    (L_tight + L_relu). While epsilon is 0, the clean cross-entropy stands in for the robust loss.

    Args:
        kappa: weight of the clean cross-entropy, constant or along the ramp.
        l1: coefficient of the l1 norm of all weights.
        regularisation: coefficient of Shi et al.'s warm-up regularisers; they fade as epsilon grows.
    """

    kappa: float | Ramp = 0.0
    l1: float = 0.0
    regularisation: float = 0.5

    def __post_init__(self) -> None:
        check_share("kappa", self.kappa)
        check(0 <= self.l1, "l1", self.l1, "a number >= 0")
        check(0 <= self.regularisation, "regularisation", self.regularisation, "a number >= 0")

    def check_model(self, model: nn.Module) -> None:
        trace(model)

    @abstractmethod
    def robust(self, model: nn.Module, batch: Batch, step: Step, clean: Forward) -> tuple[Tensor, dict, Activity]:
        """The robust loss, its named parts, and the activity of its bounds."""

    def clean_gradient(self, step: Step) -> bool:
        """Whether the loss needs the gradient of the clean pass."""
        return step.clean or value_at(self.kappa, step) > 0

    def __call__(self, model: nn.Module, batch: Batch, step: Step) -> LossTerms:
        with torch.set_grad_enabled(self.clean_gradient(step)):
            clean = forward(model, batch.images)
            check_logits(clean.logits, batch.labels)
            clean_loss = F.cross_entropy(clean.logits, batch.labels)
        parts = {"clean_loss": clean_loss, "clean_accuracy": _accuracy(clean.logits, batch.labels)}
        if step.clean:
            total, activity = clean_loss, self._activity(model, batch, step, clean)
        else:
            robust, more, activity = self.robust(model, batch, step, clean)
            total = mix(robust, clean_loss, value_at(self.kappa, step))
            parts |= more | {"robust_loss": robust}
        if self.l1:
            parts["l1"] = self.l1 * l1_norm(model)
            total = total + parts["l1"]
        if self._regularised(step):
            parts["tightness"], parts["balance"] = warmup_regularisers(activity)
            fading = self.regularisation * (1 - step.epsilon / step.epsilon_max.clamp(min=1e-30))
            total = total + fading * (parts["tightness"] + parts["balance"])
        return LossTerms(total, {name: part.detach() for name, part in parts.items()})

    def bound(
        self, model: nn.Module, batch: Batch, step: Step, statistics: Statistics, box: Interval | None = None,
        shrink: float = 1.0,
    ) -> tuple[Tensor, Activity]:  # fmt: skip
        """Lower bounds of margins over this step's set, or over a ``box``, and the activity for the regularisers."""
        region = step.ball.region(batch.images) if box is None else box
        return compute_margins(model, region, batch.labels, statistics, keep=self._regularised(step), shrink=shrink)

    def _regularised(self, step: Step) -> bool:
        return self.regularisation > 0 and step.ramp < 1

    def _activity(self, model: nn.Module, batch: Batch, step: Step, clean: Forward) -> Activity:
        if not self._regularised(step):
            return Activity(None, {})
        region = step.ball.tiny(batch.images, CLEAN_RADIUS)
        return compute_margins(model, region, batch.labels, clean.statistics, keep=True)[1]


@dataclass(frozen=True)
class AttackedLoss(CertifiedLoss):
    """A certified loss with an attack.

    Args:
        attack: any attack of the library; null for the set's default (``default_attacks``), which keeps no state.
        attack_epsilon_factor: the attack's radius over the bounds' one (2.1 in arXiv 2305.13991's 2/255 recipes).
        bn_mode: whose batch statistics the bounds use. ``adv``: those of the adversarial pass (running statistics
            move twice a step: clean, then adversarial). ``clean``: the clean pass' own, for the adversarial pass
            too (running statistics move once). Gradients flow into the statistics in both.
    """

    attack: Attack | None = attack_field("certified_training")
    attack_epsilon_factor: float = 1.0
    bn_mode: BnMode = "adv"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.attack_epsilon_factor > 0, "attack_epsilon_factor", self.attack_epsilon_factor, "a number > 0")

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return {} if self.attack is None else self.attack.declare_state(shape, classes)

    def check_ball(self, ball: PerturbationSet) -> None:
        self.attack_over(ball).check_ball(ball, "loss.attack")

    def attack_over(self, ball: PerturbationSet) -> Attack:
        return self.attack or default_attack(ball, "certified_training")

    def clean_gradient(self, step: Step) -> bool:
        return self.bn_mode == "clean" or super().clean_gradient(step)

    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> Tensor:
        """The attack's images, detached."""
        ball = step.ball.scaled(self.attack_epsilon_factor)
        return self.attack_over(ball)(model, batch, ball, step).images

    def adversarial_pass(self, model: nn.Module, images: Tensor, clean: Forward) -> Forward:
        """Forward the adversarial images; the result carries the batch statistics for the bounds."""
        return forward(model, images, clean.statistics if self.bn_mode == "clean" else None)


def attacked_parts(margins: Tensor) -> dict[str, Tensor]:
    """Loss and accuracy of margins under attack (B, K - 1), for progress and ``metrics.jsonl``."""
    return {"adversarial_loss": margin_loss(margins).mean(), "attacked_accuracy": _share_positive(margins)}


def verified_parts(margins: Tensor) -> dict[str, Tensor]:
    """Loss and accuracy of lower bounds of margins (B, K - 1), for progress and ``metrics.jsonl``."""
    return {"verified_loss": margin_loss(margins).mean(), "verified_accuracy": _share_positive(margins)}


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()


def _share_positive(margins: Tensor) -> Tensor:
    return (margins.detach() > 0).all(1).float().mean()
