"""The stages of the cascade: each looks at the problems that the earlier ones left open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..attacks import Attack
from ..bounds import compute_rows, forward
from ..noise import Noise
from ..step import Batch, Step
from .problem import Problem, Status

Replay = Callable[[Tensor], Tensor]
"""Logits (K,) of one image, in the arithmetic that a counterexample has to stand in."""


@dataclass(frozen=True)
class Finding:
    """What a stage found for a batch of B problems.

    Args:
        decided: (B,) bool.
        status: of the decided ones.
        lower_bound: (B,) of the worst margin over the region; -inf where none.
        counterexamples: (B, *shape), rows of decided problems count; None if the stage yields none.
    """

    decided: Tensor
    status: Status
    lower_bound: Tensor | None = None
    counterexamples: Tensor | None = None


class Stage(Protocol):
    name: str

    def __call__(self, problem: Problem) -> Finding: ...


@dataclass(frozen=True)
class CleanStage:
    """The image itself must be right; a tie is wrong."""

    name: str = "clean"

    def __call__(self, problem: Problem) -> Finding:
        values = problem.specification.values(forward(problem.network, problem.region.images).logits)
        wrong = ~(problem.specification.worst(values) > 0)  # written so that NaN is wrong
        return Finding(wrong, "misclassified", counterexamples=problem.region.images)


@dataclass(frozen=True)
class AttackStage:
    """Falsifies by attack. A candidate counts only when ``replay`` shows it, one image at a time."""

    attack: Attack
    seed: int = 0
    replay: Replay | None = None
    name: str = "attack"

    def __call__(self, problem: Problem) -> Finding:
        labels = problem.specification.labels
        if labels is None:
            raise ValueError("specification: found no labels; accepted: a robustness specification for this stage")
        noise = Noise(self.seed, problem.index)
        batch = Batch(problem.region.images, labels, problem.index)
        ball = problem.region.ball
        candidates = self.attack(problem.network, batch, ball, Step.evaluation(ball, noise)).images
        suspected = ~self._holds(problem, forward(problem.network, candidates).logits)
        suspected &= ball.contains(problem.region.images, candidates)
        for row in suspected.nonzero().flatten():
            logits = self._replayed(problem, candidates[row])
            suspected[row] = ~self._holds(problem.subset(row[None]), logits[None])[0]
        return Finding(suspected, "falsified", counterexamples=candidates)

    def _replayed(self, problem: Problem, image: Tensor) -> Tensor:
        return self.replay(image) if self.replay else forward(problem.network, image[None]).logits[0]

    def _holds(self, problem: Problem, logits: Tensor) -> Tensor:
        return problem.specification.worst(problem.specification.values(logits)) > 0


@dataclass(frozen=True)
class IbpStage:
    """Verifies by interval bounds, the specification merged into the last layer."""

    name: str = "ibp"

    def __call__(self, problem: Problem) -> Finding:
        specification = problem.specification
        rows = specification.rows.to(problem.region.images.dtype)
        bounds = compute_rows(problem.network, problem.region, rows) + specification.offsets
        lower = specification.worst(bounds)
        lower = torch.where(lower.isnan(), -torch.inf, lower)
        return Finding(lower > 0, "verified", lower)
