"""The recipe's ``training`` section."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..bounds import PerturbationSet
from ..config import Component
from ..data import Augment
from ..errors import check
from .averages import Averaging
from .diagnosing import Diagnose
from .guard import Guard
from .measuring import Measure
from .noising import InputNoise
from .rates import Cycle
from .schedules import EpsilonSchedule, Smoothed
from .selection import Select
from .update import Descend, UpdateRule

Initialisation = Literal[
    "shi", "shi_residual", "default", "he_fan_out", "he_fan_out_zero_bias", "he_fan_out_linear",
    "he_fan_in_zero_linear",
]  # fmt: skip


@dataclass(frozen=True)
class Optimiser(Component):
    """A torch optimiser.

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
class AdamW(Optimiser):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    weight_decay: float = 1e-2  # torch's own default

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class RAdam(Optimiser):
    """Adam whose first steps are rectified (arXiv 1908.03265)."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.RAdam(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)


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
        epochs, batch_size: number of epochs and images per batch; the last batch of an epoch may be smaller.
        accumulate: number of parts in which a batch is processed (gradients are summed, batch norm sees each part).
        optimiser, update: the optimiser, and the rule that updates the weights in each step.
        milestones, decay: the learning rate is multiplied by ``decay`` after each of these numbers of epochs, which
            need not be whole.
        milestones_from: whether milestones count from the ``start`` of training or from the end of the ramp,
            ``ramp_end``.
        cycle: learning rate interpolated step by step, instead of milestones; null for milestones.
        clip: largest global gradient norm, after all terms; null for no clipping.
        schedule: the ramp of epsilon.
        epsilon_multiplier: multiple of the recipe's epsilon at the end of the ramp, for bounds and attack; evaluations
            always use the recipe's own.
        initialisation: ``shi`` (for interval bounds), ``shi_residual`` (for those of residual nets with norms:
            branches also begin at 0), torch's ``default``, or as released networks draw theirs: ``he_fan_out``
            (convolutions N(0, 2 / fan-out): torchvision), ``he_fan_out_zero_bias`` (TRADES and relatives),
            ``he_fan_out_linear`` (linear layers too: GradAlign), ``he_fan_in_zero_linear`` (Fast-BAT's WideResNet).
        augment: crops and flips. noise: noise on the augmented images, before the attack; null for none.
        precise_bn: set batch norms' running statistics after each epoch to their mean over its clean images.
        averaging: end with averaged weights and statistics computed for them; null for none.
        measure: measurements along training; null for none.
        diagnose: diagnostics along training; null for none.
        guard: detection of catastrophic overfitting; null for none.
        select: also keep the weights of the epoch that is best on validation images; null for the last weights only.
        checkpoint_seconds: seconds between checkpoints; there is always one at the end.
    """

    epochs: int = 200
    batch_size: int = 128
    accumulate: int = 1
    optimiser: Optimiser = Adam(lr=2e-3)
    update: UpdateRule = Descend()
    milestones: tuple[float, ...] = (150, 180)
    milestones_from: Literal["start", "ramp_end"] = "start"
    decay: float = 0.2
    cycle: Cycle | None = None
    clip: float | None = 10.0
    schedule: EpsilonSchedule = Smoothed(start=1, length=100)
    epsilon_multiplier: float = 1.5
    initialisation: Initialisation = "shi"
    augment: Augment = Augment()
    noise: InputNoise | None = None
    precise_bn: bool = False
    averaging: Averaging | None = None
    measure: Measure | None = None
    diagnose: Diagnose | None = None
    guard: Guard | None = None
    select: Select | None = None
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "epochs", self.epochs, "a whole number >= 1")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number >= 1")
        check(1 <= self.accumulate <= self.batch_size, "accumulate", self.accumulate, "1 to batch_size")
        least = 1 if self.milestones_from == "start" else 0
        check(all(m >= least for m in self.milestones), "milestones", self.milestones, f"a list of epochs >= {least}")
        check(0 < self.decay <= 1, "decay", self.decay, "a number in (0, 1]")
        check(self.clip is None or self.clip > 0, "clip", self.clip, "a number > 0, or null")
        check(self.epsilon_multiplier > 0, "epsilon_multiplier", self.epsilon_multiplier, "a number > 0")
        check(self.checkpoint_seconds >= 0, "checkpoint_seconds", self.checkpoint_seconds, "a number >= 0")
        moved = self.cycle is not None and self.cycle.momentum
        sgd = isinstance(self.optimiser, Sgd)
        check(sgd or not moved, "cycle", "momentum", f"none with {type(self.optimiser).__name__}: only Sgd has one")
        ends = self.schedule.end
        check(
            ends <= self.epochs,
            "schedule",
            f"a ramp that ends with epoch {ends}",
            f"at most {self.epochs} epochs (schedule.length)",
        )
        for name in ("measure", "diagnose", "guard"):
            every = 1 if getattr(self, name) is None else getattr(self, name).every
            check(every <= self.epochs, name, f"one every {every} epochs", f"at most every {self.epochs}, the last")
        begins = 0 if self.averaging is None else self.averaging.start
        check(begins < self.epochs, "averaging", f"a start after epoch {begins}", f"one before the last, {self.epochs}")

    def check_ball(self, ball: PerturbationSet) -> None:
        """Check that noise, diagnostics and the attacks of the sections support this perturbation set.

        Raises:
            InputError: one does not; names its section.
        """
        if self.noise is not None:
            self.noise.check_ball(ball)
        for name in ("measure", "diagnose", "guard", "select"):
            if (section := getattr(self, name)) is not None:
                section.attack_over(ball).check_ball(ball, f"training.{name}.attack")
        if self.diagnose is not None:
            self.diagnose.names_for(ball)

    def learning_rate(self, epoch: float) -> float:
        """The learning rate after ``epoch`` epochs."""
        if self.cycle is not None:
            return self.optimiser.lr * self.cycle.share(epoch)
        zero = self.schedule.end if self.milestones_from == "ramp_end" else 0
        return self.optimiser.lr * self.decay ** sum(epoch >= zero + milestone for milestone in self.milestones)

    def set_rate(self, optimizer: torch.optim.Optimizer, epoch: float) -> None:
        """Set the optimiser's learning rate, and its momentum if the cycle has one."""
        momentum = None if self.cycle is None else self.cycle.momentum_at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(epoch)
            if momentum is not None:
                group["momentum"] = momentum

    def epsilon(self, largest: float, step: int, steps_per_epoch: int) -> float:
        """The radius of a 0-based step, with ``largest`` the recipe's epsilon."""
        return self.schedule.fraction(step, steps_per_epoch) * self.epsilon_multiplier * largest
