"""The best point of each image in a search, and the steps at which finished images are dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import devices
from ...step import Batch
from ..objective import Objective, lead

STRETCH = 10
"""Iterations between two checks for misclassified images: each check waits for a GPU."""


@dataclass(frozen=True)
class BestSoFar:
    """The best point so far of each image of a batch: its first misclassified point, else the one with the largest
    objective.

    Args:
        images: (B, *shape).
        values: (B,) the objective there.
        found_at: (B,) int64, the number of the first misclassified point; -1 for none yet.
    """

    images: Tensor
    values: Tensor
    found_at: Tensor

    @classmethod
    def clean(cls, model: nn.Module, batch: Batch, objective: Objective, reference: Tensor) -> BestSoFar:
        """Start from the images themselves; those misclassified have ``found_at`` 0."""
        with torch.no_grad():
            logits = model(batch.images)
        values = objective(logits, reference)
        found_at = torch.where(lead(logits, batch.labels) > 0, -1, 0)
        return cls(batch.images, torch.where(values.isnan(), -torch.inf, values), found_at)

    def open(self, rows: Tensor, number: int, mode: str) -> Tensor | None:
        """A mask (R,) bool of the ``rows`` (R,) to continue with; None for all of them.

        All rows are kept where batch norm uses the batch's statistics, and between two checks, since each one waits for
        the GPU.
        """
        if mode not in ("eval", "clean") or (devices.reading_waits(rows) and number % STRETCH):
            return None
        left = self.found_at[rows] < 0
        return None if bool(left.all()) else left

    def after(
        self, rows: Tensor, points: Tensor, logits: Tensor, labels: Tensor, values: Tensor, number: int
    ) -> BestSoFar:
        """Update with ``points`` (R, *shape) of some ``rows``, their ``logits`` (R, K) and objective ``values`` (R,);
        ``labels`` are those of the whole batch."""
        wrong = ~(lead(logits, labels[rows]) > 0)
        still = self.found_at[rows] < 0
        better = still & (wrong | (values >= self.values[rows]))
        chosen = better.reshape(-1, *[1] * (points.ndim - 1))
        return BestSoFar(
            self.images.index_copy(0, rows, torch.where(chosen, points, self.images[rows])),
            self.values.index_copy(0, rows, torch.where(better, values, self.values[rows])),
            self.found_at.index_copy(0, rows, torch.where(still & wrong, number, self.found_at[rows])),
        )
