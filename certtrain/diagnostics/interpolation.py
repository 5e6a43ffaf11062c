"""Accuracy and loss on the segment between an image x and its attacked image x + delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import Attack, lead
from ..bounds import PerturbationSet
from ..errors import check
from ..noise import Noise
from ..step import Batch, Step
from .looking import each

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""The published shares (arXiv 2502.21041)."""


@dataclass(frozen=True)
class Interpolation:
    """Means over a batch at x + share · delta.

    Args:
        shares: of delta.
        accuracies: at each share; ties and NaN count as wrong.
        losses: cross-entropies at each share.
    """

    shares: tuple[float, ...]
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]


def interpolation(
    model: nn.Module,
    batch: Batch,
    ball: PerturbationSet,
    noise: Noise,
    *,
    attack: Attack,
    shares: Sequence[float] = SHARES,
) -> Interpolation:
    """Accuracy and loss from the clean images (share 0) to the attacked ones (share 1).

    A network that overfits to a one-step attack inside the ball of a norm fails on this segment; one that overfits
    to one-step sPGD fails in other pixels, and is most accurate at the end of the segment.

    Args:
        attack: defines delta; it should change every image, also those that are misclassified already.
        shares: in [0, 1].
    Raises:
        InputError: the batch is empty, a share out of range, or the attack does not know the set.
    """
    check(shares and all(0 <= share <= 1 for share in shares), "shares", list(shares), "numbers in [0, 1]")

    def found(part: Batch, step: Step) -> Tensor:
        ends = attack(model, part, ball, step).images
        seen = []
        for share in shares:
            with torch.no_grad():
                logits = model(torch.lerp(part.images, ends, share))  # at 0 and 1 exactly the one and the other
            right = (lead(logits, part.labels) > 0).double()
            seen.append(torch.stack([right, F.cross_entropy(logits, part.labels, reduction="none").double()], 1))
        return torch.stack(seen, 1)

    accuracies, losses = each(model, batch, ball, noise, found).mean(0).unbind(1)
    return Interpolation(tuple(shares), tuple(accuracies.tolist()), tuple(losses.tolist()))
