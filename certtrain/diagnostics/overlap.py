"""The overlap of the pixels that two attacks change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks import Attack
from ..bounds import PerturbationSet, SparseBall
from ..errors import check
from ..noise import Noise
from ..step import Batch, Step
from .looking import each, share


@dataclass(frozen=True)
class Overlap:
    """Means over the images that both attacks change; A and B are the sets of changed units, out of N.

    Means are None where there is no such image.

    Args:
        overlap: mean of |A ∩ B| / k, k at most N.
        jaccard: mean of |A ∩ B| / |A ∪ B|.
        chance: mean of |A| |B| / (N k): the expected ``overlap`` if the units of each were drawn at random (mean of a
            hypergeometric distribution); k / N where both change all k.
        distance: mean of the number of units in which the two results differ, divided by its largest value |A| + |B|:
            1 where A and B are disjoint, 0 where the results are the same.
        sizes: means of |A| and of |B|.
        images: number of images that both attacks change.
    """

    overlap: float | None
    jaccard: float | None
    chance: float | None
    distance: float | None
    sizes: tuple[float | None, float | None]
    images: int


def overlap(
    model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, *, first: Attack, second: Attack
) -> Overlap:
    """The overlap of two attacks within a sparse set.

    Each draws its own random numbers: from a common start even attacks that ignore the network would agree.

    Raises:
        InputError: the batch is empty, the set is no ``SparseBall``, or an attack does not know it.
    """
    sparse = _sparse(ball)

    def found(part: Batch, step: Step) -> Tensor:
        results = [
            attack(model, part, ball, step.again(name)).images
            for name, attack in (("first", first), ("second", second))
        ]
        return counts(sparse, part.images, *results)

    return summary(sparse, batch.images, each(model, batch, ball, noise, found))


def between(ball: PerturbationSet, images: Tensor, first: Tensor, second: Tensor) -> Overlap:
    """The same of given results, all (B, *shape)."""
    sparse = _sparse(ball)
    return summary(sparse, images, counts(sparse, images, first, second))


def _sparse(ball: PerturbationSet) -> SparseBall:
    check(SparseBall.matches(ball), "perturbation", ball.kind, "SparseBall: others change every pixel")
    return SparseBall.of(ball)


def counts(ball: SparseBall, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(B, 5) float64: |A|, |B|, |A ∩ B|, in how many units the results differ, and k, at most N."""

    def places(x: Tensor, y: Tensor) -> Tensor:
        return ball.grouped(x != y).any(1)

    a, b, apart = places(images, first), places(images, second), places(first, second)
    k = torch.as_tensor(ball.counts(images), device=images.device).clamp(max=a.shape[1]).expand(len(images))
    return torch.stack([a.sum(1), b.sum(1), (a & b).sum(1), apart.sum(1), k], 1).double()


def summary(ball: SparseBall, images: Tensor, found: Tensor) -> Overlap:
    """The means over images of the counts (B, 5) that ``counts`` returns."""
    units = ball.units(images.shape[1:])
    a, b, both, apart, k = found[(found[:, :2] > 0).all(1)].unbind(1)
    one = torch.ones_like(a)
    values = (both / k, both / (a + b - both), a * b / (units * k), apart / (a + b), a, b)
    shared, jaccard, chance, distance, first, second = (share(value, one) for value in values)
    return Overlap(shared, jaccard, chance, distance, (first, second), len(a))
