"""What a search has met so far, image by image, and when it looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import devices
from ...step import Batch
from ..objective import Objective, lead

STRETCH = 10
"""Iterations between two looks at which images are fooled by now: each look waits for a GPU."""


@dataclass(frozen=True)
class Found:
    """What a search has met so far of each image of a batch: its first misclassified point, else the one with the
    largest objective.

    Args:
        images: (B, *shape).
        values: (B,) the objective there.
        found_at: (B,) int64, the number of the first misclassified point; -1 for none yet.
    """

    images: Tensor
    values: Tensor
    found_at: Tensor

    @classmethod
    def clean(cls, model: nn.Module, batch: Batch, objective: Objective, reference: Tensor) -> Found:
        """The images themselves; a clean error was found at 0."""
        with torch.no_grad():
            logits = model(batch.images)
        values = objective(logits, reference)
        found_at = torch.where(lead(logits, batch.labels) > 0, -1, 0)
        return cls(batch.images, torch.where(values.isnan(), -torch.inf, values), found_at)

    def open(self, rows: Tensor, number: int, mode: str) -> Tensor | None:
        """Which of ``rows`` (R,) are worth going on with, (R,) bool; None for all of them.

        Batch norm that takes the batch's statistics has to see the whole batch; and a GPU is asked in some steps only,
        since each look waits for it.
        """
        if mode not in ("eval", "clean") or (devices.waits(rows) and number % STRETCH):
            return None
        left = self.found_at[rows] < 0
        return None if bool(left.all()) else left

    def after(self, rows: Tensor, points: Tensor, logits: Tensor, labels: Tensor, values: Tensor, number: int) -> Found:
        """With ``points`` (R, *shape) of some ``rows``, where the model has ``logits`` (R, K) and the objective
        ``values`` (R,); ``labels`` are those of the whole batch."""
        wrong = ~(lead(logits, labels[rows]) > 0)
        still = self.found_at[rows] < 0
        better = still & (wrong | (values >= self.values[rows]))
        chosen = better.reshape(-1, *[1] * (points.ndim - 1))
        return Found(
            self.images.index_copy(0, rows, torch.where(chosen, points, self.images[rows])),
            self.values.index_copy(0, rows, torch.where(better, values, self.values[rows])),
            self.found_at.index_copy(0, rows, torch.where(still & wrong, number, self.found_at[rows])),
        )
