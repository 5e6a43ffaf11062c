"""Noise on the training images, beneath the attack: what the network sees as its clean images."""

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
    """Noise that replaces a batch's images by noisy ones, for attack, losses and bounds alike."""

    @abstractmethod
    def check_ball(self, ball: PerturbationSet) -> None:
        """
        Raises:
            InputError: there is no such noise for this set.
        """

    @abstractmethod
    def __call__(self, batch: Batch, step: Step) -> Batch:
        """The batch with noisy images, in [0, 1]; numbers are keyed by ``step.noise``."""


@dataclass(frozen=True)
class SparseNoise(InputNoise):
    """N-FGSM for l0 (arXiv 2202.01181; Zhong et al., NeurIPS 2025): random pixels take random values.

    Of each image as many pixels (or other units of the set) as are drawn uniformly from 0 … most · k, k being the
    step's own; their changes are uniform in [-1, 1], cut to valid images: our choice, because the sources are silent.
    With the attack around it up to (most + 1) k pixels differ from the image.

    Args:
        most: in k.
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
