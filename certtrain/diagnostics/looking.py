"""Helpers of all diagnostics: evenly spread images, and passes in evaluation mode, some images at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attacks import in_mode
from ..bounds import PerturbationSet
from ..data import Split
from ..errors import check
from ..labels import check_logits
from ..noise import Noise
from ..step import Batch, Step

BATCH = 256
"""Images that pass through the network at once; affects results by float rounding only."""


def spread(split: Split, count: int) -> Batch:
    """``count`` images evenly spread over a split, or all of a smaller one, without augmentation; always the same.

    The first images of a split that is sorted by class would be of one class.
    """
    check(count >= 1 and len(split) >= 1, "images", min(count, len(split)), "a split and a sample of one image or more")
    count = min(count, len(split))
    index = torch.arange(count, device=split.labels.device) * len(split) // count
    return Batch(split.pixels(index), split.labels[index], index)


def each(
    model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, found: Callable[[Batch, Step], Tensor]
) -> Tensor:
    """Concatenate the results (b, …) of ``found`` for all parts of the batch: (B, …) float64.

    Raises:
        InputError: the batch is empty; logits of fewer than two classes; labels outside of the classes.
    """
    check(len(batch), "batch", len(batch), "one image or more")
    parts = []
    with in_mode(model, training=False):
        with torch.no_grad():
            check_logits(model(batch.images[:1]), batch.labels)
        for first in range(0, len(batch), BATCH):
            rows = slice(first, first + BATCH)
            step = Step.evaluation(ball, replace(noise, positions=noise.positions[rows]))
            parts.append(found(batch.part(rows), step).double())
    return torch.cat(parts)


def share(counted: Tensor, of: Tensor) -> float | None:
    """sum(counted) / sum(of); None where the denominator is 0."""
    whole = float(of.sum())
    return float(counted.sum()) / whole if whole else None
