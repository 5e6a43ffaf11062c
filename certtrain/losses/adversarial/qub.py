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
    """QUB: the accuracy term of a method, bounded from above by a quadratic around the clean logits (arXiv 2601.13645).

    CE(a, y) <= CE(z, y) + (a - z)·(softmax(z) - y) + |a - z|² / 4, for clean logits z and adversarial logits a. The
    attack stays the base's own, and so do its regularisers. A base whose accuracy term is the clean cross-entropy
    (TRADES, FAIT, HAT, NuAT) has it replaced by the bound, and keeps its divergence: nobody has published that.

    The clean pass comes after the attack, in the authors' code before it: an attack in evaluation mode sees running
    statistics that are younger by one update there.

    Args:
        base: any method whose accuracy term is a cross-entropy.
        kind: ``static``, or ``decreasing``: (1 - t) · bound + t · the base's own term, t = epoch / epochs.
        bound: ``published``; or ``centred``, which is tighter, still an upper bound, and like the cross-entropy blind
            to what is added to all logits: |d|² - (sum of d)² / K in place of |d|² (Böhning 1992).
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
            passes.needed, passes.adversarial, passes.labels, centred=self.bound == "centred", detached=self.detached
        )


def quadratic_upper_bound(
    clean: Tensor, adversarial: Tensor, labels: Tensor, *, centred: bool = False, detached: bool = False
) -> Tensor:
    """(B,) upper bounds of CE(adversarial, labels), both logits (B, K), at least in float32; equal to it where they
    agree.

    The cross-entropy's Hessian in the logits is at most 1/2 everywhere, and at most (1 - 11ᵀ / K) / 2 (``centred``).
    """
    if clean.dtype in (torch.float16, torch.bfloat16):  # the squares of whose differences overflow, or lose the bound
        clean, adversarial = clean.float(), adversarial.float()
    residual = F.softmax(clean, 1) - F.one_hot(labels, clean.shape[1])
    change = adversarial - clean
    square = change.square().sum(1)
    if centred:
        square = square - change.sum(1).square() / clean.shape[1]
    linear = (change * (residual.detach() if detached else residual)).sum(1)
    return F.cross_entropy(clean, labels, reduction="none") + linear + square / 4
