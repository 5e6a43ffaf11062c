"""Detection of catastrophic overfitting during training: robustness that falls within a few epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attacks import Attack, attack_field, default_attack
from ..bounds import PerturbationSet
from ..data import Dataset
from ..diagnostics import each, spread
from ..errors import InputError, check
from ..noise import Noise, key_of
from ..step import Batch, Step

ROUNDING = 1e-9
"""Tolerance of shares, so that a fall of exactly ``fall`` never counts."""


@dataclass(frozen=True)
class Guard:
    """Measure the accuracy under attack every few epochs, always on the same images, and act when it falls.

    Fast-AT does this with PGD-5 on a batch of each epoch (arXiv 2001.03994). The test split is never used.

    Args:
        every: epochs between two checks.
        images: number of images, spread evenly over the split; all of a smaller split.
        split: source of the images, as stored: ``train``, or ``validation``, held out by ``data.validation``.
        attack: null for the set's default: PGD-10, for a sparse set sPGD-20. Run at the recipe's own epsilon with the
            same noise at each check.
        fall: largest loss of accuracy, as a share of the images, that does not count as a fall.
        since: the accuracy to compare with: that of the ``previous`` check, or the ``best`` so far.
        action: after a fall ``warn``, ``stop`` the training with the current weights, or stop after a ``rollback`` to
            the weights of the check before the fall.
    """

    every: int = 1
    images: int = 256
    split: Literal["train", "validation"] = "train"
    attack: Attack | None = attack_field("accuracy")
    fall: float = 0.2
    since: Literal["previous", "best"] = "previous"
    action: Literal["warn", "stop", "rollback"] = "warn"

    def __post_init__(self) -> None:
        check(self.every >= 1, "every", self.every, "a number of epochs >= 1")
        check(self.images >= 1, "images", self.images, "a whole number >= 1")
        check(self.split in ("train", "validation"), "split", self.split, "train, validation")
        harmless = self.attack is None or self.attack.attack_mode != "train"
        check(harmless, "attack", self.attack, "an attack_mode that leaves running statistics alone: not train")
        check(0 < self.fall < 1, "fall", self.fall, "a share in (0, 1)")
        check(self.since in ("previous", "best"), "since", self.since, "previous, best")
        check(self.action in ("warn", "stop", "rollback"), "action", self.action, "warn, stop, rollback")

    def attack_over(self, ball: PerturbationSet) -> Attack:
        return self.attack or default_attack(ball, "accuracy")

    def check_data(self, dataset: Dataset) -> None:
        """Check that the split holds images.

        Raises:
            InputError: it holds none.
        """
        if self.split == "validation" and not len(dataset.validation):
            raise InputError(
                "training.guard.split: found validation, which holds no images; accepted: train, or a data.validation "
                "above 0"
            )

    def measure(self, model: nn.Module, dataset: Dataset, ball: PerturbationSet, seed: int) -> float:
        """The share of the images that the network, in evaluation mode, classifies correctly under attack.

        Logits that are not finite count as wrong. The model and torch's generator are restored.

        Raises:
            InputError: as ``check_data``.
        """
        self.check_data(dataset)
        batch = spread(dataset.train if self.split == "train" else dataset.validation, self.images)
        attack = self.attack_over(ball)

        def correct(part: Batch, step: Step) -> Tensor:
            images = attack(model, part, ball, step).images
            with torch.no_grad():
                logits = model(images)
            return (logits.argmax(1) == part.labels) & logits.isfinite().all(1)

        return float(each(model, batch, ball, Noise(key_of(seed, "guard"), batch.index), correct).mean())

    def fell(self, before: float | None, now: float) -> bool:
        """Whether accuracy fell by more than ``fall`` since ``before`` (None: not measured yet), or to NaN."""
        return before is not None and not before - now <= self.fall + ROUNDING


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Args:
        figures: figures for the epoch's line: ``guard_accuracy``; after a fall also ``guard_fell_from``, and after a
            rollback ``guard_rolled_back_to``, a number of epochs.
        alarm: warning to print at once, or None.
        halt: whether training ends here.
    """

    figures: Mapping[str, float | int]
    alarm: str | None = None
    halt: bool = False


@dataclass
class LastCheck:
    """The guard's state between checks; its ``vars`` are part of the checkpoint.

    Args:
        accuracy: the accuracy with which the next check is compared; None before the first one.
        epoch: number of epochs after which it was measured.
        weights: the weights with which it was measured, on the CPU; kept only for a rollback.
        halted: whether the guard has ended this training, so that a resume has nothing left to train.
    """

    accuracy: float | None = None
    epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    halted: bool = False

    def check(
        self, settings: Guard, model: nn.Module, dataset: Dataset, ball: PerturbationSet, seed: int, epoch: int
    ) -> CheckResult:
        """Measure the weights after ``epoch`` epochs and act; a rollback loads the earlier weights into the model."""
        now = settings.measure(model, dataset, ball, seed)
        figures: dict[str, float | int] = {"guard_accuracy": now}
        before, since = self.accuracy, self.epoch
        fell = settings.fell(before, now)
        self.halted = fell and settings.action != "warn"
        if fell and settings.action == "rollback":
            model.load_state_dict(self.weights)
            figures["guard_rolled_back_to"] = since
        elif not self.halted and (before is None or settings.since == "previous" or now >= before):
            self._remember(settings, model, now, epoch)
        if before is None or not fell:
            return CheckResult(figures)
        outcome = {"warn": "training goes on", "stop": "training ends here",
                   "rollback": f"training ends with the weights of epoch {since}"}[settings.action]  # fmt: skip
        alarm = (
            f"catastrophic overfitting: after epoch {epoch} accuracy under attack is {100 * now:.1f} %, after epoch "
            f"{since} it was {100 * before:.1f} %; {outcome}"
        )
        return CheckResult({**figures, "guard_fell_from": before}, alarm, self.halted)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.accuracy, self.epoch, self.halted = state["accuracy"], state["epoch"], state["halted"]
        self.weights = dict(state["weights"])

    def _remember(self, settings: Guard, model: nn.Module, now: float, epoch: int) -> None:
        self.accuracy, self.epoch = now, epoch
        if settings.action == "rollback":
            self.weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
