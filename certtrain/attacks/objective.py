"""Objectives of attacks: the cross-entropy, or a divergence from the clean prediction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Component
from ..labels import classes_of
from ..step import Batch


@dataclass(frozen=True)
class Objective(Component):
    """A function of a batch's logits, one number for each sample."""

    @abstractmethod
    def reference(self, model: nn.Module, batch: Batch) -> Tensor:
        """The reference that logits are compared with, detached; computed once, before the first step."""

    @abstractmethod
    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Values (B,) of logits (B, K)."""


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """CE(f(x'), y), with soft labels where a loss has set them."""

    def reference(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.labels if batch.targets is None else batch.targets

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        return F.cross_entropy(logits, reference, reduction="none")


@dataclass(frozen=True)
class Margin(Objective):
    """max over j ≠ y of z_j - z_y, above 0 exactly where the prediction is wrong; its gradient does not vanish where a
    network is confident."""

    def reference(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.labels

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        return -lead(logits, reference)


@dataclass(frozen=True)
class SwitchedMargin(Objective):
    """The cross-entropy where the label leads by ``switch`` or more, else the margin max over j of z_j - z_y.

    The cross-entropy of a confident network has a gradient of almost 0 (the later code of sPGD, arXiv 2405.05075).
    """

    switch: float = 0.5

    def reference(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.labels

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        ahead = lead(logits, reference)
        cross_entropy = F.cross_entropy(logits, reference, reduction="none")
        return torch.where(ahead.detach() >= self.switch, cross_entropy, -ahead)


def lead(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the largest other one, (B,) from logits (B, K).

    A prediction is right where this is above 0; ties and NaN are wrong.

    Raises:
        InputError: logits of one class.
    """
    classes_of(logits)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return logits.gather(1, labels[:, None])[:, 0] - others


@dataclass(frozen=True)
class Divergence(Objective):
    """A Bregman divergence Δ(p, q) = ψ(p) - ψ(q) - <∇ψ(q), p - q> of softmax distributions, both given by logits.

    The same object serves attack and loss. Δ >= 0, and 0 exactly where p = q; adding a number to all logits of a
    distribution changes nothing. An attack's objective is Δ(f(x), f(x')) with a constant first argument.
    """

    def reference(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            return model(batch.images)

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        return self.between(reference, logits)

    @abstractmethod
    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """(B,) Δ(softmax(first), softmax(second)) of logits (B, K), differentiable in both."""

    @abstractmethod
    def potential(self, logits: Tensor) -> Tensor:
        """(B,) ψ(softmax(logits)); smallest for uniform predictions."""


@dataclass(frozen=True)
class KullbackLeibler(Divergence):
    """ψ(p) = sum_k p_k log p_k, the negative entropy: Δ(p, q) = KL(p || q)."""

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        first, second = F.log_softmax(first, 1), F.log_softmax(second, 1)
        return (first.exp() * (first - second)).sum(1)

    def potential(self, logits: Tensor) -> Tensor:
        logarithms = F.log_softmax(logits, 1)
        return (logarithms.exp() * logarithms).sum(1)


@dataclass(frozen=True)
class SquaredEuclidean(Divergence):
    """ψ(p) = S(p) = sum_k p_k²: Δ(p, q) = |p - q|², symmetric, at most 2 (SCORE's distance, arXiv 2202.10103)."""

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        return (F.softmax(first, 1) - F.softmax(second, 1)).square().sum(1)

    def potential(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, 1).square().sum(1)


def nonzero_start(objective: Objective, kept: Tensor, fresh: Callable[[], Tensor]) -> Tensor:
    """The start (B, *shape) of each sample: its stored change, or a fresh one where that is 0 and the objective is a
    divergence, whose gradient is 0 at the image itself."""
    if not isinstance(objective, Divergence):
        return kept
    nothing = (kept == 0).flatten(1).all(1).reshape(-1, *[1] * (kept.ndim - 1))
    return torch.where(nothing, fresh(), kept)
