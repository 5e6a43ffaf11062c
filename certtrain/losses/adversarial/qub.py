from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import check
from ...step import Step
from .base import Accuracy, AdversarialLoss, Passes, Wrapper
from .n_fgsm import NFgsm

Bound = Literal["published", "centred", "adaptive"]


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
            not change when a number is added to all logits: |d|² - (sum of d)² / K in place of |d|² (Böhning 1992); or
            ``adaptive``, the centred one with each sample's own bound of the Hessian's norm between the two
            predictions (``curvature``) in place of 1/2. Ours; still an upper bound, never above the centred one.
        detached: whether softmax(z) - y is a constant. The authors' code lets its gradient flow.
    """

    base: AdversarialLoss = NFgsm()
    kind: Literal["static", "decreasing"] = "static"
    bound: Bound = "published"
    detached: bool = False

    def __post_init__(self) -> None:
        found = type(self.base).__name__
        check(self.base.term, "base", found, "a method whose accuracy term is the cross-entropy of one example")
        check(self.kind in ("static", "decreasing"), "kind", self.kind, "static, decreasing")
        check(self.bound in get_args(Bound), "bound", self.bound, ", ".join(get_args(Bound)))

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
            bound=self.bound,
            detached=self.detached,
        )


def quadratic_upper_bound(
    clean: Tensor, adversarial: Tensor, labels: Tensor, *, bound: Bound = "published", detached: bool = False
) -> Tensor:
    """(B,) upper bounds of CE(adversarial, labels) from logits (B, K), computed in float32 or wider; exact where the
    two logits agree.

    The cross-entropy's Hessian in the logits is at most 1/2 everywhere, and at most (1 - 11ᵀ / K) / 2 (``centred``); on
    the segment between the logits at most ``curvature`` · (1 - 11ᵀ / K) (``adaptive``).
    """
    if clean.dtype in (torch.float16, torch.bfloat16):  # squares of differences overflow, or round below the bound
        clean, adversarial = clean.float(), adversarial.float()
    residual = F.softmax(clean, 1) - F.one_hot(labels, clean.shape[1])
    change = adversarial - clean
    square = change.square().sum(1)
    if bound != "published":
        square = square - change.sum(1).square() / clean.shape[1]
    if bound == "adaptive":
        square = 2 * curvature(clean, adversarial) * square
    linear = (change * (residual.detach() if detached else residual)).sum(1)
    return F.cross_entropy(clean, labels, reduction="none") + linear + square / 4


@torch.no_grad()
def curvature(first: Tensor, second: Tensor) -> Tensor:
    """(B,) upper bounds, at most 1/2, of the norm of the cross-entropy's Hessian diag(p) - ppᵀ at all logits between
    ``first`` and ``second`` (B, K). Constants: no gradient flows into them.

    Its norm is at most 2 · max p_k (1 - p_k), by Gershgorin. The log-odds z_k - log sum of exp(z_j), j ≠ k, of a class
    are concave along the segment, so that its probability stays above m, the smaller one of the two ends. Where m > 1/2
    for one class, all others stay below 1 - m, and the norm below 2 m (1 - m); elsewhere the bound is 1/2.
    """
    leading = first.argmax(1, keepdim=True)
    ends = (z.gather(1, leading)[:, 0] - z.scatter(1, leading, -torch.inf).logsumexp(1) for z in (first, second))
    odds = torch.minimum(*ends).clamp(min=0)
    return 2 * odds.sigmoid() * (-odds).sigmoid()  # 1 - m itself would be 0 for confident networks
