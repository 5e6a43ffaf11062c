"""Diagnostics from logits under attack: how tight QUB is, and how a divergence splits along the attack's iterates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import Ascent, Attack, Divergence, KullbackLeibler, default_attack, gradient_of
from ..bounds import NormBall, PerturbationSet
from ..losses import quadratic_upper_bound
from ..losses.adversarial.trades import ATTACK
from ..noise import Noise
from ..step import Batch, Step
from .looking import each

KL = KullbackLeibler()


@dataclass(frozen=True)
class QubGap:
    """Means over a batch with clean logits z and attacked logits a (arXiv 2601.13645).

    Args:
        gap, centred_gap: mean of QUB - CE(a, y) for the published and for the centred bound; up to rounding between 0
            and |a - z|² / 4.
        distance: mean of |a - z|.
        curvature: mean of the largest eigenvalue of diag(p) - pp^T, p = softmax(z): the cross-entropy's Hessian at z,
            which both bounds replace by 1/2.
    """

    gap: float
    centred_gap: float
    distance: float
    curvature: float


def qub_gap(
    model: nn.Module, batch: Batch, ball: PerturbationSet, noise: Noise, *, attack: Attack | None = None
) -> QubGap:
    """How far QUB lies above the loss that it bounds, at the images of an attack; logits are compared in float64.

    Raises:
        InputError: the batch is empty.
    """

    chosen = attack or default_attack(ball, "many_steps")

    def found(part: Batch, step: Step) -> Tensor:
        images = chosen(model, part, ball, step).images
        with torch.no_grad():
            clean, attacked = model(part.images).double(), model(images).double()
        loss = F.cross_entropy(attacked, part.labels, reduction="none")
        gaps = [quadratic_upper_bound(clean, attacked, part.labels, bound=b) - loss for b in ("published", "centred")]
        return torch.stack([*gaps, (attacked - clean).norm(dim=1), largest_curvature(F.softmax(clean, 1))], 1)

    return QubGap(*each(model, batch, ball, noise, found).mean(0).tolist())


def largest_curvature(p: Tensor) -> Tensor:
    """(B,) the largest eigenvalue of diag(p) - pp^T for each row of ``p`` (B, K), K >= 2, in O(B · K).

    It lies between the two largest entries of p, where sum_k p_k² / (p_k - λ) increases and equals 1 once.
    """
    low, high = p.topk(2).values.flip(1).unbind(1)
    for _ in range(60):
        middle = (low + high) / 2
        below = (p.square() / (p - middle[:, None])).sum(1) < 1
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


@dataclass(frozen=True)
class DivergenceSplit:
    """The terms of TRADES and FAIT on given images, means over the batch.

    Args:
        whole: R = Δ(f(x), f(x')).
        split: R' = Δ(f(x), f(x*)) + Δ(f(x*), f(x')) for x* each of the attack's iterates I = 1..steps - 1.
    """

    whole: float
    split: tuple[float, ...]


def divergence_split(
    model: nn.Module,
    batch: Batch,
    ball: PerturbationSet,
    noise: Noise,
    *,
    divergence: Divergence = KL,
    attack: Ascent = ATTACK,
) -> DivergenceSplit:
    """R and R' at every index, from one attack: FAIT's curves.

    R' <= R is a lemma for predictions at x* on the segment between the two others; an attack's iterates need not lie
    there.

    Args:
        divergence: the divergence that is split; the attack maximises it unless it has its own objective.
        attack: any attack of steps; TRADES' by default.
    Raises:
        InputError: the batch is empty, or the set is not the ball of a norm.
    """
    objective, norm_ball = attack.toward(divergence).objective or divergence, NormBall.of(ball)

    def found(part: Batch, step: Step) -> Tensor:
        reference, visited = objective.reference(model, part), []
        points = attack.begin(part, norm_ball, step)
        for _ in range(attack.steps):
            logits, gradient = gradient_of(model, points, lambda z: objective(z, reference))
            visited.append(logits.double())
            points = attack.move(part.images, points, gradient, norm_ball)
        with torch.no_grad():
            clean, last = model(part.images).double(), model(points).double()
        split = [divergence.between(clean, x) + divergence.between(x, last) for x in visited[1:]]
        return torch.stack([divergence.between(clean, last), *split], 1)

    whole, *split = each(model, batch, ball, noise, found).mean(0).tolist()
    return DivergenceSplit(whole, tuple(split))
