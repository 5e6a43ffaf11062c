"""Adversaries of correctly classified images: none, interval bounds, PGD."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attacks import Ascent, lead
from ..bounds import PerturbationSet, SparseBall, UnsupportedOperation, checked_logits, compute_margins
from ..step import Batch, Step


@dataclass(frozen=True)
class Outcome:
    """The outcome for one image.

    Args:
        lost_to: name of the attack that made the network wrong, or of the bounds that did not prove the image; None if
            it stays right.
        unconfirmed: attacks that claimed a success that was not confirmed by a replay.
        details: further fields of the image's line, see ``DETAILS``.
    """

    lost_to: str | None = None
    unconfirmed: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


DETAILS = {"queries": int, "found_at": int, "changed": int, "change": list}
"""Further fields of lines about sparse sets: the number of queries of black-box attacks; for lost images the iteration
or query that found the point, the number of changed units, and their values."""


class Adversary(ABC):
    """An attempt to change correct predictions, or to prove that they cannot change. Networks are in evaluation mode,
    their weights without gradients."""

    certifies: ClassVar[bool] = False
    """Whether the images that are not lost are proved to stay right."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its attacks if it is several, one after the other; else none."""
        return ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of its rows and files."""

    def basis(self, batch_size: int) -> dict[str, Any]:
        """The settings on which its results depend."""
        return {}

    def versions(self) -> dict[str, str]:
        """Versions of further packages that compute its results."""
        return {}

    def refuses(self, model: nn.Module | None, images: Tensor | None, ball: PerturbationSet) -> str:
        """The reason why it does not support this set, or this network and these images if they are given; ``""`` if it
        does."""
        return ""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        """The outcome for each sample of a batch of correctly classified images.

        Args:
            step: its ``noise`` is keyed by the samples' numbers.
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
    """Interval bounds: accuracy certified by IBP in nearest arithmetic; images that are not proved are lost."""

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
        except UnsupportedOperation as error:
            return str(error)
        return ""

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> list[Outcome]:
        checked_logits(model, batch.images)
        margins, _ = compute_margins(model, ball.region(batch.images), batch.labels)
        return [Outcome(None if proved else "bounds") for proved in (margins > 0).all(1).tolist()]


@dataclass(frozen=True)
class RestartedPgd(Adversary):
    """PGD on the cross-entropy from uniform starts; an image is lost if *any* restart ends at a wrong prediction.

    Each restart attacks only the images that the earlier ones left. Start r of a sample does not depend on the number
    of restarts or on the batches, so that more restarts never raise the accuracy.

    Args:
        label: name of the row.
        steps, restarts: 50 and 10 for PGD-50-10.
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
    """(B,) bool, whether the label's logit is above all others. Ties and NaN are wrong."""
    return lead(model(images), labels) > 0
