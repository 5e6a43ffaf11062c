"""Measurements of losses and bounds along training: off by default, without effect on the training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import Attack, attack_field, default_attack
from ..bounds import Interval, PerturbationSet, compute_margins, forward, trace
from ..data import Split, in_order
from ..errors import check
from ..losses.certified import margin_loss, margins_of, mix
from ..noise import Noise, key_of
from ..step import Step

ROUNDING = 1e-5
"""Fall of a float32 loss, relative to 1 + its size, that still counts as not falling."""
SHIFT = 100.0


@dataclass(frozen=True)
class Measure:
    """Measurements on the first training images, at the recipe's own epsilon, in evaluation mode.

    Each measurement is a line of ``metrics.jsonl`` with ``"kind": "measurement"``: for each alpha the CC-IBP loss
    (``cc_losses``); the share of images whose loss never falls as alpha grows (``ordered``, arXiv 2305.13991,
    definition 3.1); the largest change of a loss if 100 is added to all logits (``shift_error``, its assumption 2.1);
    the loss under attack and that of the bounds; for each layer of ReLUs the number of its ``units``, the mean radius
    of their inputs' intervals, and the share of inputs without a fixed sign (``unstable``).

    Args:
        every: epochs between two measurements.
        images: number of images.
        alphas: rising values of alpha for the CC-IBP loss.
        attack: the attack that finds adversarial examples; null for the set's default: PGD-8, for a sparse set sPGD-20.
    """

    every: int = 10
    images: int = 512
    alphas: tuple[float, ...] = (0.0, 0.01, 0.1, 0.3, 0.5, 1.0)
    attack: Attack | None = attack_field("measure")

    def __post_init__(self) -> None:
        check(self.every >= 1, "every", self.every, "a number of epochs >= 1")
        check(self.images >= 1, "images", self.images, "a whole number >= 1")
        harmless = self.attack is None or self.attack.attack_mode != "train"
        check(harmless, "attack", self.attack, "an attack_mode that leaves running statistics alone: not train")
        rising = all(0 <= low < high <= 1 for low, high in pairwise(self.alphas))
        check(rising and len(self.alphas) > 1, "alphas", self.alphas, "a rising list of two or more numbers in [0, 1]")

    def attack_over(self, ball: PerturbationSet) -> Attack:
        return self.attack or default_attack(ball, "measure")

    @torch.no_grad()
    def __call__(self, model: nn.Module, split: Split, ball: PerturbationSet, seed: int) -> dict[str, Any]:
        """Measure. The model's mode is restored."""
        count = min(self.images, len(split))
        (batch,) = in_order(split, count, stop=count)
        training = model.training
        model.eval()
        try:
            step = Step.evaluation(ball, Noise(key_of(seed, "measure"), batch.index))
            attack = self.attack_over(ball)
            logits = forward(model, attack(model, batch, ball, step).images).logits
            verified, activity = compute_margins(model, ball.region(batch.images), batch.labels, keep=True)
        finally:
            model.train(training)
        attacked = margins_of(logits, batch.labels)
        losses = torch.stack([margin_loss(mix(attacked, verified, alpha)) for alpha in self.alphas], 1)
        falls = losses[:, 1:] < losses[:, :-1] - ROUNDING * (1 + losses[:, :-1].abs())
        plain, shifted = (F.cross_entropy(z, batch.labels, reduction="none") for z in (logits, logits + SHIFT))
        layers = [(trace(model).affine_before(place).path, found) for place, found in activity.preactivations.items()]
        return {
            "alphas": list(self.alphas), "cc_losses": losses.mean(0).tolist(),
            "ordered": float((~falls).all(1).float().mean()), "shift_error": float((shifted - plain).abs().max()),
            "adversarial_loss": float(margin_loss(attacked).mean()),
            "verified_loss": float(margin_loss(verified).mean()),
            "layers": [{"path": path, **_layer(found)} for path, found in layers],
        }  # fmt: skip


def _layer(interval: Interval) -> dict[str, Any]:
    unstable: Tensor = (interval.lower < 0) & (interval.upper > 0)
    return {
        "units": interval.center[0].numel(), "radius": float(interval.radius.mean()),
        "unstable": float(unstable.float().mean()),
    }  # fmt: skip
