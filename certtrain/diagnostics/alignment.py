"""How reliable one step of an attack is: gradients that turn, and decision boundaries that the step jumps over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attacks import Ascent, Attack, CrossEntropy, default_attack, gradient_of
from ..bounds import PerturbationSet
from ..noise import Noise
from ..step import Batch, Step
from .looking import each, share

FGSM = Ascent(attack_mode="eval", steps=1, step_size=1.0, start="zero")
PGD = Ascent(attack_mode="eval", steps=10, step_size=0.25, start="uniform")


def gradient_alignment(model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise) -> float | None:
    """The mean cosine of the loss' gradients at x and x + eta, eta uniform in the ball (GradAlign, arXiv 2007.02617).

    Near 1 the loss is linear in the images, and one gradient step finds what many would; it falls where training
    overfits catastrophically. x + eta is not clipped to valid images.

    Args:
        batch: images (B, *shape), float32 or float64; noise: keyed by each image.
    Returns:
        in [-1, 1]; None where every image has a zero gradient at x or at x + eta. Such images are left out.
    Raises:
        InputError: the batch is empty.
    """

    def found(part: Batch, step: Step) -> Tensor:
        eta = ball.sample(part.images, step.noise, "eta")
        return cosines(*(_gradient(model, points, part.labels) for points in (part.images, part.images + eta)))

    cosine, counted = each(model, batch, ball, noise, found).unbind(1)
    return share(cosine, counted)


def fgsm_pgd_cosine(
    model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, *, attack: Attack | None = None
) -> float | None:
    """The mean cosine of FGSM's change, from the image itself, and that of a stronger ``attack``.

    Returns:
        in [-1, 1]; None where every image is left unchanged by one of the two. Such images are left out.
    Raises:
        InputError: the batch is empty.
    """
    both = FGSM, attack or default_attack(ball, "many_steps")

    def found(part: Batch, step: Step) -> Tensor:
        return cosines(*(each_of(model, part, ball, step).images - part.images for each_of in both))

    cosine, counted = each(model, batch, ball, noise, found).unbind(1)
    return share(cosine, counted)


def boundary_distortion(
    model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, *, points: int = 100
) -> float | None:
    """The share of images that are misclassified somewhere along FGSM's step, among those correct at both of its ends.

    Kim et al. (arXiv 2010.01799). The points are x + (k / points) · delta, k = 1..points - 1.

    Returns:
        in [0, 1]; None where no image is classified correctly at both ends.
    Raises:
        InputError: the batch is empty.
    """

    def found(part: Batch, step: Step) -> Tensor:
        delta = FGSM(model, part, ball, step).images - part.images
        with torch.no_grad():

            def right(k: int) -> Tensor:
                return model(part.images + k / points * delta).argmax(1) == part.labels

            ends = right(0) & right(points)
            between = torch.ones_like(ends)
            for k in range(1, points):
                between &= right(k)
        return torch.stack([ends & ~between, ends], 1)

    distorted, both = each(model, batch, ball, noise, found).unbind(1)
    return share(distorted, both)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """(B, 2): the cosine of each pair of (B, *shape), and a 1; both 0 where one of the pair is all zeros.

    In float64, where no square of a float32 number underflows.
    """
    first, second = first.double().flatten(1), second.double().flatten(1)
    lengths = first.norm(dim=1) * second.norm(dim=1)
    zero = lengths == 0
    cosine = (first * second).sum(1) / torch.where(zero, 1, lengths)
    return torch.stack([torch.where(zero, 0, cosine), (~zero).double()], 1)


def _gradient(model: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    return gradient_of(model, points, lambda logits: CrossEntropy()(logits, labels))[1]
