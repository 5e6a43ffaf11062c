"""A batch with its images attacked: what diagnostics of the weights look at."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..attacks import Attack
from ..bounds import PerturbationSet
from ..noise import Noise
from ..step import Batch, Step
from .looking import each


def attacked(model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, attack: Attack) -> Batch:
    """Attack the batch's images, with the network in evaluation mode.

    Raises:
        InputError: the batch is empty, or the attack does not know the set.
    """

    def found(part: Batch, step: Step) -> Tensor:
        return attack(model, part, ball, step).images

    images = each(model, batch, ball, noise, found)
    return replace(batch, images=images.to(batch.images.dtype))  # exact: the attack's float32 images in float64
