"""The attacks that diagnostics compare: one step, as in single-step training, and many."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..attacks import Attack, FrankWolfe, SparsePgd, SparseRs, customary
from ..bounds import L1Ball, NormBall, PerturbationSet, SparseBall
from ..noise import Noise
from ..step import Batch, Step
from .alignment import FGSM, PGD
from .looking import each

ONE_STEP = SparsePgd(steps=1, alpha=1.0, beta=1.0, patience=None, keep="last")
"""sPGD as in one-step training (arXiv 2502.21041), from a random start."""
TWENTY_STEPS = SparsePgd(steps=20, patience=10, keep="last")
"""sPGD as in multi-step training, without early stop: the loss of every image counts."""
SEARCH_STEPS = 100
RANDOM_SEARCH = SparseRs(queries=1000)
"""Sparse-RS, which uses no gradients and is not misled by them."""


def one_step(ball: PerturbationSet) -> Attack:
    """The one-step attack of a set: FGSM in the ball of a norm, the linear maximum in an l1 ball, else one-step
    sPGD."""
    if isinstance(ball, L1Ball):
        return FrankWolfe(steps=1)
    return FGSM if isinstance(ball, NormBall) else ONE_STEP


def many_steps(ball: PerturbationSet, attack: Attack = PGD) -> Attack:
    """The multi-step attack of a set: ``attack``, but where that is the default, PGD-10, in an l1 ball 20 steps of
    Frank and Wolfe, in a sparse set sPGD-20. Each changes every image, right or wrong."""
    if attack == PGD and isinstance(ball, SparseBall):
        return TWENTY_STEPS
    return customary(attack, PGD, ball, 20)


def searching(ball: PerturbationSet, attack: Attack = PGD) -> Attack:
    """``attack``, but where that is the default, in a sparse set sPGD-100, which ends at the first wrong prediction."""
    return customary(attack, PGD, ball, SEARCH_STEPS)


def attacked(model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, attack: Attack) -> Batch:
    """Attack the batch's images, with the network in evaluation mode.

    Raises:
        InputError: the batch is empty, or the attack does not know the set.
    """

    def found(part: Batch, step: Step) -> Tensor:
        return attack(model, part, ball, step).images

    images = each(model, batch, ball, noise, found)
    return replace(batch, images=images.to(batch.images.dtype))  # exact: the attack's float32 images in float64
