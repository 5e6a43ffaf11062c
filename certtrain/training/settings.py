"""How a network is trained: the recipe's ``training`` section."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..config import Component
from ..data import Augment
from ..errors import check
from .schedules import EpsilonSchedule, Smoothed
from .update import Descend, UpdateRule


@dataclass(frozen=True)
class Optimiser(Component):
    """A torch optimiser by name.

    Args:
        lr: learning rate at the start.
        weight_decay: as in torch.
    """

    lr: float = 5e-4
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check(self.lr > 0, "lr", self.lr, "a number > 0")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer: ...


@dataclass(frozen=True)
class Adam(Optimiser):
    """Adam with torch's default betas."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Sgd(Optimiser):
    """Stochastic gradient descent with momentum."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        check(self.momentum > 0 or not self.nesterov, "nesterov", self.nesterov, "false where momentum is 0")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )  # fmt: skip


@dataclass(frozen=True)
class Training:
    """The recipe's ``training`` section.

    Args:
        epochs, batch_size: the last batch of an epoch may be smaller.
        accumulate: a batch is worked through in this many parts (gradients are summed, batch norm sees each part).
        optimiser, update: what a step does with the gradient.
        milestones, decay: the learning rate is multiplied by ``decay`` after each of these numbers of epochs.
        clip: largest global gradient norm, after all terms; null for none.
        schedule: how epsilon grows.
        epsilon_multiplier: the ramp ends at this multiple of the recipe's epsilon, for bounds and attack alike;
            evaluation always uses the recipe's own.
        initialisation: ``shi`` (for interval bounds) or torch's ``default``.
        augment: crops and flips.
        checkpoint_seconds: time between checkpoints; there is one at the end in any case.
    """

    epochs: int = 200
    batch_size: int = 128
    accumulate: int = 1
    optimiser: Optimiser = Adam(lr=2e-3)
    update: UpdateRule = Descend()
    milestones: tuple[int, ...] = (150, 180)
    decay: float = 0.2
    clip: float | None = 10.0
    schedule: EpsilonSchedule = Smoothed(start=1, length=100)
    epsilon_multiplier: float = 1.5
    initialisation: Literal["shi", "default"] = "shi"
    augment: Augment = Augment()
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "epochs", self.epochs, "a whole number >= 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number >= 1")
        check(1 <= self.accumulate <= self.batch_size, "accumulate", self.accumulate, "1 to batch_size")
        check(all(m >= 1 for m in self.milestones), "milestones", self.milestones, "a list of epochs >= 1")
        check(0 < self.decay <= 1, "decay", self.decay, "a number in (0, 1]")
        check(self.clip is None or self.clip > 0, "clip", self.clip, "a number > 0, or null")
        check(self.epsilon_multiplier > 0, "epsilon_multiplier", self.epsilon_multiplier, "a number > 0")
        check(self.checkpoint_seconds >= 0, "checkpoint_seconds", self.checkpoint_seconds, "a number >= 0")
        ends = self.schedule.start - 1 + self.schedule.length
        check(ends <= self.epochs, "schedule", f"a ramp that ends with epoch {ends}", f"at most {self.epochs} epochs")

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of a 0-based epoch."""
        return self.optimiser.lr * self.decay ** sum(epoch >= milestone for milestone in self.milestones)

    def epsilon(self, largest: float, step: int, steps_per_epoch: int) -> float:
        """The radius of a 0-based step, where ``largest`` is the recipe's own."""
        return self.schedule.fraction(step, steps_per_epoch) * self.epsilon_multiplier * largest
