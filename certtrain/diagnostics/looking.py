"""What all diagnostics share: the network in evaluation mode and left as it was, some images at a time."""

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
"""Images that pass through the network at once; what is found does not depend on it, up to float rounding."""


def spread(split: Split, count: int) -> Batch:
    """``count`` images evenly spread over a split, or all of a smaller one, as stored: the same at every call.

    The first ones of a split that is sorted by class would be of one class.
    """
    check(count >= 1 and len(split) >= 1, "images", min(count, len(split)), "a split and a sample of one image or more")
    count = min(count, len(split))
    index = torch.arange(count, device=split.labels.device) * len(split) // count
    return Batch(split.pixels(index), split.labels[index], index)


def each(
    model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, found: Callable[[Batch, Step], Tensor]
) -> Tensor:
    """(B, …) float64: what ``found`` yields for a part of the batch (b, …), for all parts.

    Raises:
        InputError: the batch is empty; the network has no logits of two classes or more, or labels are none of them.
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
    """The sum of ``counted`` over that of ``of``; None where there is nothing to be a share of."""
    whole = float(of.sum())
    return float(counted.sum()) / whole if whole else None
