"""The adversarial loss as a function of the weights: its sharpness, and its gradient's dependence on the attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import Attack
from ..bounds import PerturbationSet
from ..errors import check
from ..noise import Noise
from ..step import Batch, Step
from .hessian import Spectrum, eigenpairs, hessian_spectrum, trained_twin
from .looking import each
from .one_and_many import attacked

GROUP = 128
"""Images in one gradient of the weights: the published batch size."""


def adversarial_hessian(
    model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, *, attack: Attack, top: int = 10
) -> Spectrum:
    """The largest eigenvalues of the Hessian of the cross-entropy at an attack's images, which are held fixed.

    The Hessian of the maximum over the set differs by a positive term from the movement of the maximiser. ReLU networks
    have a Hessian almost everywhere, smooth ones (softplus) everywhere.

    Args:
        top: from 1 to the number of weights - 1.
    Raises:
        InputError: the batch is empty, ``top`` out of range, the eigenvalues do not settle, or the attack does not
            know the set.
    """
    return hessian_spectrum(model, attacked(model, batch, ball, noise, attack), top)


@dataclass(frozen=True)
class WeightLandscape:
    """Mean adversarial losses on a plane through the weights, row by row.

    Args:
        steps: (S,) float64, Euclidean coordinates on both axes: from -reach to reach, 0 in the middle.
        losses: (S, S) at weights + steps[i] · v1 + steps[j] · v2.
        values: the eigenvalues of v1 and v2.
    """

    steps: Tensor
    losses: Tensor
    values: tuple[float, float]


def weight_landscape(
    model: nn.Module,
    batch: Batch,
    ball: PerturbationSet,
    noise: Noise,
    *,
    attack: Attack,
    half: int = 3,
    reach: float = 0.5,
) -> WeightLandscape:
    """The adversarial loss along the two leading eigenvectors of ``adversarial_hessian``.

    The attack runs anew at every point of the grid, with the same random numbers, so that the surface is that of the
    attacked loss and not of the loss at fixed images.

    Args:
        half: grid points on each side of the weights: 2 · half + 1 along each axis.
        reach: distance of the outermost points; v1 and v2 have length 1.
    Raises:
        InputError: as ``adversarial_hessian``; or half or reach are out of range.
    """
    check(half >= 1, "half", half, "a whole number >= 1")
    check(0 < reach < float("inf"), "reach", reach, "a number > 0, a length in weight space")
    spectrum, vectors = eigenpairs(model, attacked(model, batch, ball, noise, attack), 2)
    twin, weights = trained_twin(model)
    before = [weight.detach().clone() for weight in weights]
    sizes = [weight.numel() for weight in weights]
    directions = [[part.view_as(w) for part, w in zip(vector.split(sizes), weights)] for vector in vectors]
    steps = torch.arange(-half, half + 1, dtype=torch.float64) / half * reach

    def found(part: Batch, step: Step) -> Tensor:
        images = attack(twin, part, ball, step).images
        with torch.no_grad():
            return F.cross_entropy(twin(images), part.labels, reduction="none")

    losses = torch.empty(len(steps), len(steps), dtype=torch.float64)
    for i, a in enumerate(steps.tolist()):
        for j, b in enumerate(steps.tolist()):
            for weight, start, first, second in zip(weights, before, *directions):
                weight.data.copy_(start + (a * first + b * second).to(start.dtype))
            losses[i, j] = each(twin, batch, ball, noise, found).mean()
    return WeightLandscape(steps, losses, spectrum.values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GradientGap:
    """Means, over groups of at most 128 images, of Euclidean norms over all trainable weights.

    Args:
        gap: norm of the difference between the weights' gradients at the images of one step and of many.
        length: norm of the gradient at the images of many steps, for comparison.
    """

    gap: float
    length: float


def gradient_gap(
    model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, *, one: Attack, many: Attack
) -> GradientGap:
    """The difference between the weights' gradients under a one-step and a multi-step attack; in float64.

    Both attacks start from the same random numbers.

    Raises:
        InputError: the batch is empty, or an attack does not know the set.
    """
    near, far = (attacked(model, batch, ball, noise, attack) for attack in (one, many))
    twin, weights = trained_twin(model, torch.float64)

    def gradient(part: Batch) -> Tensor:
        with torch.enable_grad():
            loss = F.cross_entropy(twin(part.images.double()), part.labels)
        pieces = torch.autograd.grad(loss, weights, materialize_grads=True)
        return torch.cat([piece.reshape(-1) for piece in pieces])

    gaps, lengths = [], []
    for first in range(0, len(batch), GROUP):
        rows = slice(first, first + GROUP)
        at_far = gradient(far.part(rows))
        gaps.append((gradient(near.part(rows)) - at_far).norm())
        lengths.append(at_far.norm())
    return GradientGap(float(torch.stack(gaps).mean()), float(torch.stack(lengths).mean()))
