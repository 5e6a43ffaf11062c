"""Noise added to the training images before the attack; the network takes the noisy images for the clean ones."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch

from ..bounds import PerturbationSet, SparseBall
from ..config import Component
from ..errors import InputError, check
from ..step import Batch, Step


@dataclass(frozen=True)
class InputNoise(Component):
    """Noise on a batch's images, which attack, losses and bounds then use."""

    @abstractmethod
    def check_ball(self, ball: PerturbationSet) -> None:
        """Check that the noise supports this perturbation set.

        Raises:
            InputError: it does not.
        """

    @abstractmethod
    def __call__(self, batch: Batch, step: Step) -> Batch:
        """The batch with noisy images in [0, 1]; random numbers come from ``step.noise``."""


@dataclass(frozen=True)
class SparseNoise(InputNoise):
    """N-FGSM for l0 (arXiv 2202.01181; Zhong et al., NeurIPS 2025): random pixels take random values.

    The number of changed pixels (or other units of the set) of each image is uniform in 0 … most · k, with the k of the
    step. Changes are uniform in [-1, 1], clipped to valid images; this is our choice, the papers do not say. Together
    with the attack up to (most + 1) k pixels differ from the image.

    Args:
        most: largest number of changed pixels, as a multiple of k.
    """

    most: float = 2.0

    def __post_init__(self) -> None:
        check(0 < self.most < float("inf"), "most", self.most, "a number > 0, in k")

    def check_ball(self, ball: PerturbationSet) -> None:
        if not SparseBall.matches(ball):
            raise InputError(f"training.noise: found SparseNoise for a {ball.kind}; accepted: a SparseBall")

    def __call__(self, batch: Batch, step: Step) -> Batch:
        ball, images = SparseBall.of(step.ball), batch.images
        share = step.noise.uniform((), "noisy units", torch.float64)
        count = (share * (ball.scaled(self.most).k + 1)).long()
        change = dataclasses.replace(ball, k=count).sample(images, step.noise, "input noise")
        return replace(batch, images=(images + change).clamp(0, 1))
