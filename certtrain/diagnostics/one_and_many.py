"""The attacks that diagnostics set against each other: one step, as cheap training takes it, and many."""

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
"""Of one-step training (arXiv 2502.21041), with its random start."""
TWENTY_STEPS = SparsePgd(steps=20, patience=10, keep="last")
"""Of multi-step training, without its early stop: the loss of every image counts."""
SEARCH_STEPS = 100
RANDOM_SEARCH = SparseRs(queries=1000)
"""Which asks the network for no gradients, and finds what they hide."""


def one_step(ball: PerturbationSet) -> Attack:
    """FGSM for the ball of a norm, in an l1 ball the linear maximum, one-step sPGD for a sparse set."""
    if isinstance(ball, L1Ball):
        return FrankWolfe(steps=1)
    return FGSM if isinstance(ball, NormBall) else ONE_STEP


def many_steps(ball: PerturbationSet, attack: Attack = PGD) -> Attack:
    """``attack``; where it is only the default, what climbs the set's loss far: PGD-10, in an l1 ball 20 steps of
    Frank and Wolfe's, for a sparse set sPGD-20. Each attacks every image, right or wrong."""
    if attack == PGD and isinstance(ball, SparseBall):
        return TWENTY_STEPS
    return customary(attack, PGD, ball, 20)


def searching(ball: PerturbationSet, attack: Attack = PGD) -> Attack:
    """``attack``; where it is only the default, for a sparse set sPGD-100, which ends at the first wrong prediction."""
    return customary(attack, PGD, ball, SEARCH_STEPS)


def attacked(model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, attack: Attack) -> Batch:
    """The batch with its images attacked, the network in evaluation mode.

    Raises:
        InputError: the batch is empty, or the attack does not know the set.
    """

    def found(part: Batch, step: Step) -> Tensor:
        return attack(model, part, ball, step).images

    images = each(model, batch, ball, noise, found)
    return replace(batch, images=images.to(batch.images.dtype))  # which float64 held exactly
