"""The loss on a plane through an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import CrossEntropy, gradient_of
from ..bounds import NormBall, PerturbationSet
from ..errors import check
from ..noise import Noise
from ..step import Batch, Step
from .looking import BATCH, each


@dataclass(frozen=True)
class Landscape:
    """Mean losses on a grid, row by row.

    Args:
        steps: (S,) float64, the coordinates on both axes in units of epsilon: from -reach to reach, 0 in the middle.
        losses: (S, S) at x + steps[i] · d1 + steps[j] · d2.
    """

    steps: Tensor
    losses: Tensor


def landscape(
    model: nn.Module,
    batch: Batch,
    ball: PerturbationSet,
    noise: Noise,
    *,
    half: int = 10,
    reach: float = 1.0,
) -> Landscape:
    """The cross-entropy around images, along the gradient's direction and a random one, both of length epsilon.

    In an l_inf ball d1 = epsilon · sign of the gradient and d2 = epsilon · random signs; in other balls the ball's own
    directions of the same vectors. Points are not clipped to valid images. The range is the same for all networks, so
    that figures can be compared. Losses are means over the batch; a batch of one shows one image.

    Args:
        half: grid points on each side of the image: 2 · half + 1 along each axis.
        reach: distance of the outermost points, in epsilons.
    Raises:
        InputError: the batch is empty, or half or reach are out of range.
    """
    check(NormBall.matches(ball), "perturbation", ball.kind, "the ball of a norm")
    ball = NormBall.of(ball)
    check(half >= 1, "half", half, "a whole number >= 1")
    check(0 < reach < float("inf"), "reach", reach, "a number > 0, in epsilons")
    steps = torch.arange(-half, half + 1, dtype=torch.float64, device=batch.labels.device) / half * reach

    def found(part: Batch, step: Step) -> Tensor:
        _, gradient = gradient_of(model, part.images, lambda z: CrossEntropy()(z, part.labels))
        signs = 2 * step.noise.integers(2, part.images.shape[1:], "rademacher").to(part.images.dtype) - 1
        first, second = (ball.radius(along) * ball.direction(along) for along in (gradient, signs))
        losses = []
        every = torch.arange(len(steps) ** 2 * len(part), device=steps.device)  # points of the grid, image by image
        for some in every.split(BATCH):
            image, place = some // len(steps) ** 2, some % len(steps) ** 2
            a, b = (
                steps[axis].to(part.images.dtype).reshape(-1, *[1] * (part.images.ndim - 1))
                for axis in (place // len(steps), place % len(steps))
            )
            with torch.no_grad():
                logits = model(part.images[image] + a * first[image] + b * second[image])
            losses.append(F.cross_entropy(logits, part.labels[image], reduction="none"))
        return torch.cat(losses).reshape(len(part), len(steps), len(steps))

    return Landscape(steps, each(model, batch, ball, noise, found).mean(0))
