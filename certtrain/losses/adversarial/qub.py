from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import check
from ...step import Step
from .base import Accuracy, AdversarialLoss, Passes, Wrapper
from .n_fgsm import NFgsm


@dataclass(frozen=True)
class Qub(Wrapper):
    """QUB: replace a method's accuracy term by a quadratic upper bound around the clean logits (arXiv 2601.13645).

    CE(a, y) <= CE(z, y) + (a - z)·(softmax(z) - y) + |a - z|² / 4, for clean logits z and adversarial logits a. The
    base's attack and regularisers are kept. Where its accuracy term is the clean cross-entropy (TRADES, FAIT, HAT,
    NuAT), the bound replaces that and the divergence stays; this combination is not published.

    The clean pass comes after the attack; in the authors' code it comes before, so that an attack in evaluation mode
    sees running statistics that are one update newer there.

    Args:
        base: any method whose accuracy term is a cross-entropy.
        kind: ``static``, or ``decreasing``: (1 - t) · bound + t · the base's own term, t = epoch / epochs.
        bound: ``published``; or ``centred``, which is tighter, still an upper bound, and like the cross-entropy does
            not change when a number is added to all logits: |d|² - (sum of d)² / K in place of |d|² (Böhning 1992).
        detached: whether softmax(z) - y is a constant. The authors' code lets its gradient flow.
    """

    base: AdversarialLoss = NFgsm()
    kind: Literal["static", "decreasing"] = "static"
    bound: Literal["published", "centred"] = "published"
    detached: bool = False

    def __post_init__(self) -> None:
        found = type(self.base).__name__
        check(self.base.term, "base", found, "a method whose accuracy term is the cross-entropy of one example")
        check(self.kind in ("static", "decreasing"), "kind", self.kind, "static, decreasing")
        check(self.bound in ("published", "centred"), "bound", self.bound, "published, centred")

    @property
    def term(self) -> None:
        return None

    def criterion(self, passes: Passes, step: Step, accuracy: Accuracy | None = None) -> Tensor:
        total = self.base.criterion(passes, step, self._bound)
        if self.kind == "static":
            return total
        share = step.epoch / step.epochs
        return (1 - share) * total + share * self.base.criterion(passes, step, accuracy)

    def _bound(self, passes: Passes, step: Step) -> Tensor:
        return quadratic_upper_bound(
            passes.clean_logits,
            passes.adversarial,
            passes.labels,
            centred=self.bound == "centred",
            detached=self.detached,
        )


def quadratic_upper_bound(
    clean: Tensor, adversarial: Tensor, labels: Tensor, *, centred: bool = False, detached: bool = False
) -> Tensor:
    """(B,) upper bounds of CE(adversarial, labels) from logits (B, K), computed in float32 or wider; exact where the
    two logits agree.

    The cross-entropy's Hessian in the logits is at most 1/2 everywhere, and at most (1 - 11ᵀ / K) / 2 (``centred``).
    """
    if clean.dtype in (torch.float16, torch.bfloat16):  # squares of differences overflow, or round below the bound
        clean, adversarial = clean.float(), adversarial.float()
    residual = F.softmax(clean, 1) - F.one_hot(labels, clean.shape[1])
    change = adversarial - clean
    square = change.square().sum(1)
    if centred:
        square = square - change.sum(1).square() / clean.shape[1]
    linear = (change * (residual.detach() if detached else residual)).sum(1)
    return F.cross_entropy(clean, labels, reduction="none") + linear + square / 4
