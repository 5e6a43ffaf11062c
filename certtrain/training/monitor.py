"""Checks after each epoch: guard, validation split, candidate for the best weights, measurements, diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..bounds import PerturbationSet
from ..data import Dataset
from .evaluation import check_program, evaluate
from .guard import LastCheck
from .selection import SCORE, Best
from .settings import Training


@dataclass(frozen=True)
class EpochReport:
    """The results of the checks after an epoch.

    Args:
        figures: figures for the epoch's line of ``metrics.jsonl``.
        lines: further lines of that file.
        alarm: warning to print at once, or None.
        halt: whether training ends here.
    """

    figures: Mapping[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    alarm: str | None = None
    halt: bool = False


class EpochMonitor:
    """The checks after each epoch; their state is part of the checkpoint."""

    def __init__(self, settings: Training, dataset: Dataset, ball: PerturbationSet, seed: int):
        self.settings, self.dataset, self.ball, self.seed = settings, dataset, ball, seed
        self.best = Best()
        self.last_check = LastCheck()

    @property
    def halted(self) -> bool:
        """Whether the guard has ended this training."""
        return self.last_check.halted

    def check(self, model: nn.Module, epoch: int) -> EpochReport:
        """Check the model after ``epoch`` epochs; a rollback of the guard changes its weights."""
        settings, validation = self.settings, self.dataset.validation
        check_program(model, self.dataset.train)
        figures: dict[str, Any] = {}
        lines, alarm = [], None
        if settings.guard and epoch % settings.guard.every == 0:
            checked = self.last_check.check(settings.guard, model, self.dataset, self.ball, self.seed, epoch)
            figures |= checked.figures  # first, because a rollback changes the weights
            alarm = checked.alarm
        if len(validation):
            figures |= evaluate(model, validation, self.ball)
        last = epoch == settings.epochs or self.halted
        if settings.select and (last or epoch % settings.select.every == 0):
            figures[SCORE] = self.best.consider(settings.select, model, validation, self.ball, self.seed, epoch)
        if settings.measure and epoch % settings.measure.every == 0:
            measured = settings.measure(model, self.dataset.train, self.ball, self.seed)
            lines.append({"kind": "measurement", "epoch": epoch, **measured})
        if settings.diagnose and epoch % settings.diagnose.every == 0:
            measured = settings.diagnose(model, self.dataset.train, self.ball, self.seed)
            lines.append({"kind": "diagnosis", "epoch": epoch, **measured})
        return EpochReport(figures, lines, alarm, self.halted)

    def state(self) -> dict[str, Any]:
        return {"best": vars(self.best), "last_check": vars(self.last_check)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best.restore(state["best"])
        self.last_check.restore(state["last_check"])
