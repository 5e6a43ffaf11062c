"""Who tries to make a network wrong on images that it has right: nobody, intervals, PGD."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attacks import Ascent, lead
from ..bounds import PerturbationSet, SparseBall, UnsupportedNode, checked_logits, compute_margins
from ..step import Batch, Step


@dataclass(frozen=True)
class Outcome:
    """What became of an image.

    Args:
        to: what made the network wrong on it (of intervals: what left it unproved); None where nothing did.
        unconfirmed: what claimed to, and was not borne out when it was replayed.
        details: what its line says more, of ``DETAILS``.
    """

    lost_to: str | None = None
    unconfirmed: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


DETAILS = {"queries": int, "found_at": int, "changed": int, "change": list}
"""What lines on sparse sets may say: how many queries black-box attacks made; of what is lost the iteration or query
that found it, the number of changed units, and their values."""


class Adversary(ABC):
    """What is tried on images that the network has right. Networks are given in evaluation mode, their
    weights without gradients."""

    certifies: ClassVar[bool] = False
    """Whether what it leaves is proved to be right."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Under which names it counts losses, where it is several attacks one after the other; else none."""
        return ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Of its rows and files."""

    def basis(self, batch_size: int) -> dict[str, Any]:
        """What its results depend on."""
        return {}

    def versions(self) -> dict[str, str]:
        """Of what else computes its results."""
        return {}

    def refuses(self, model: nn.Module | None, images: Tensor | None, ball: PerturbationSet) -> str:
        """Why it cannot be tried on such a set, or, where they are given, such a network and such images; empty where
        it can."""
        return ""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        """One for each sample of a batch, all rightly classified.

        Args:
            step: ``step.noise`` is keyed by the samples' numbers.
        """


@dataclass(frozen=True)
class Clean(Adversary):
    """The images as they are."""

    @property
    def name(self) -> str:
        return "clean"

    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        return [Outcome()] * len(batch)


@dataclass(frozen=True)
class Intervals(Adversary):
    """What interval bounds do not prove is lost: certified accuracy by IBP, in nearest arithmetic."""

    certifies: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "ibp"

    @torch.no_grad()
    def refuses(self, model: nn.Module | None, images: Tensor | None, ball: PerturbationSet) -> str:
        if model is None or images is None:
            return ""
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        try:
            compute_margins(model, ball.region(images), labels)
        except UnsupportedNode as error:
            return str(error)
        return ""

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        checked_logits(model, batch.images)
        margins, _ = compute_margins(model, ball.region(batch.images), batch.labels)
        return [Outcome(None if proved else "bounds") for proved in (margins > 0).all(1).tolist()]


@dataclass(frozen=True)
class RestartedPgd(Adversary):
    """PGD on the cross-entropy from uniform starts; an image is lost if *any* start ends at a wrong prediction.

    Each restart sees only what the earlier ones left. Start number r of a sample is the same however many restarts
    there are and however samples are batched, so more restarts never raise the accuracy.

    Args:
        label: the row's name.
        steps, restarts: PGD-50-10 has 50 and 10.
        step_size: in epsilons.
    """

    label: str
    steps: int
    restarts: int = 1
    step_size: float = 0.25

    @property
    def name(self) -> str:
        return self.label

    def basis(self, batch_size: int) -> dict[str, Any]:
        return {"steps": self.steps, "restarts": self.restarts, "step_size": self.step_size}

    def refuses(self, model: nn.Module | None, images: Tensor | None, ball: PerturbationSet) -> str:
        if Ascent.needs.matches(ball):
            return ""
        here = "spgd-u-STEPS, sparse-autoattack" if SparseBall.matches(ball) else "default, the set's own attack"
        return f"found a {ball.kind}; accepted: the ball of a norm, or here {here}"

    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        attack = Ascent(steps=self.steps, step_size=self.step_size, start="uniform")
        lost, left = [Outcome()] * len(batch), torch.arange(len(batch), device=batch.labels.device)
        for restart in range(1, self.restarts + 1):
            if not len(left):
                break
            part = rows_of(batch, left)
            noise = replace(step.again(restart).noise, positions=part.index)
            points = attack(model, part, ball, replace(step, noise=noise)).images
            right = is_right(model, points, part.labels)
            for row in left[~right].tolist():
                lost[row] = Outcome(f"restart {restart}")
            left = left[right]
        return lost


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    return Batch(batch.images[rows], batch.labels[rows], batch.index[rows])


@torch.no_grad()
def is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: is the label's logit above all others? A tie is wrong, and so is NaN."""
    return lead(model(images), labels) > 0
