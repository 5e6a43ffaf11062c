"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import PerturbationSet
from ..config import stable_mapping, with_sections
from ..data import Dataset, Loader
from ..errors import Failure, InputError
from ..losses import Loss
from ..noise import Noise, key_of
from ..progress import Progress, describe
from ..run_folder import RunFolder
from ..step import SINGLE_PROCESS, Batch, Exchange, State, Step
from . import checkpoint
from .averages import WeightAverage, recompute_statistics
from .evaluation import check_program
from .interruption import Interrupted, StopRequest
from .monitor import EpochMonitor
from .selection import Best
from .settings import Training
from .update import NonFinite

SHOWN = ("loss", "clean_accuracy", "attacked_accuracy", "verified_accuracy")


class TrainingStopped(Failure):
    """Training cannot go on; the message names the step, the terms and the last good checkpoint."""


@dataclass
class Position:
    """The progress of a run: ``step`` steps are done, the next is ``batch`` of ``epoch`` (both 0-based)."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0


def fit(
    model: nn.Module,
    dataset: Dataset,
    *,
    loss: Loss,
    ball: PerturbationSet,
    settings: Training,
    seed: int,
    folder: RunFolder,
    stop: StopRequest,
    exchange: Exchange = SINGLE_PROCESS,
    quiet: bool = False,
) -> Best:
    """Train ``model`` from the start or from the checkpoint in ``folder``. ``dataset`` is on the model's device.

    Appends one line per epoch to ``metrics.jsonl`` and leaves a checkpoint at the end.

    Returns:
        the best weights according to ``settings.select``; none without it.
    Raises:
        InputError: the checkpoint is broken or belongs to another architecture; or the model and its traced network
            differ, which is checked before the first step and after each epoch.
        Interrupted: a signal stopped the training; the checkpoint is up to date.
        TrainingStopped: the loss or its gradient was not finite.
    """
    run = _Fit(model, dataset, loss, ball, settings, seed, folder, exchange)
    check_program(model, dataset.train)
    model.train()
    with Progress("training", run.steps, done=run.position.step, quiet=quiet) as progress:
        for epoch in range(run.position.epoch, 0 if run.monitor.halted else settings.epochs):
            for batch in run.loader.epoch(epoch, start=run.position.batch):
                progress.advance(1, run.step(batch))
                if run.position.batch == len(run.loader):
                    run.end_epoch(epoch, progress)
                signal = stop.signal
                if signal or run.is_due:
                    run.save()
                if signal:
                    raise Interrupted(signal)
            if run.monitor.halted:
                break
    return run.monitor.best


class _Fit:
    """The constants of one training, and its state, which is kept in the checkpoint."""

    def __init__(
        self, model: nn.Module, dataset: Dataset, loss: Loss, ball: PerturbationSet, settings: Training, seed: int,
        folder: RunFolder, exchange: Exchange,
    ):  # fmt: skip
        """Set up a training, or continue it from the checkpoint in ``folder``."""
        self.model, self.loss, self.ball, self.settings = model, loss, ball, settings
        self.seed, self.folder, self.exchange = seed, folder, exchange
        device = dataset.train.labels.device
        self.loader = Loader(dataset.train, settings.batch_size, settings.augment, seed)
        self.steps = settings.epochs * len(self.loader)
        self.size = ball.size
        self.optimizer = settings.optimiser.build(model)
        specs = loss.declare_state(dataset.shape, dataset.classes)
        tensors = {
            name: spec.allocate(len(dataset.train), settings.batch_size, device, settings.augment.pad)
            for name, spec in sorted(specs.items())
        }
        self.state = State(tensors, specs)
        self.recipe = self.fingerprint_of(loss, settings, dataset)
        self.average = WeightAverage(model, settings.averaging, len(self.loader))
        self.monitor = EpochMonitor(settings, dataset, ball, seed)
        self.position, self.sums = Position(), _Means()
        if folder.resume.exists():
            # 0.1 did not tell a set's default attack from none
            known = self.recipe, self.fingerprint_of(with_sections(loss), with_sections(settings), dataset)
            self.position, self.sums = _restore(
                folder, known, device, model, self.optimizer, self.average, self.monitor, tensors
            )
        folder.metrics.truncate(self.position.metrics_bytes)
        self.before = self.position.seconds
        self.started = self.saved = time.monotonic()

    def fingerprint_of(self, loss: Loss, settings: Training, dataset: Dataset) -> str:
        """The fingerprint of the recipe, which a checkpoint of this training has to have."""
        parts = [stable_mapping(part) for part in (loss, self.ball, settings)]
        return checkpoint.fingerprint([*parts, self.seed, dataset.checksum, loss.files()])

    def seconds(self, now: float) -> float:
        """Seconds of training up to ``now``, summed over all calls that trained this run."""
        return self.before + now - self.started

    def epsilon(self, number: int) -> float:
        """The radius of a 0-based step."""
        return self.settings.epsilon(self.ball.epsilon, number, len(self.loader))

    def step(self, batch: Batch) -> dict[str, float]:
        """Change the weights once (or once for every replay) and advance the position.

        Returns:
            the figures to display.
        Raises:
            TrainingStopped: the loss or its gradient was not finite.
        """
        settings, position = self.settings, self.position
        settings.set_rate(self.optimizer, position.step / len(self.loader))
        torch.manual_seed(key_of(self.seed, "torch", position.step))  # for layers such as dropout
        step = self._settings_of_step(batch)
        if settings.noise is not None:
            batch = settings.noise(batch, step)
        figures: dict[str, float] = {}
        try:
            for replay in range(self.loss.replays):
                parts = _split(batch, step if replay == 0 else step.again(replay), settings)
                figures = settings.update(self.model, self.optimizer, self.loss, parts, settings.clip)
        except NonFinite as error:
            raise TrainingStopped(_failure_text(position, error, self.folder)) from error
        self.sums.add(figures, self.exchange.samples(len(batch)))
        shown = {name: figures[name] for name in SHOWN if name in figures} | {self.size: self.epsilon(position.step)}
        position.batch, position.step = position.batch + 1, position.step + 1
        self.average.update(self.model, position.step)
        return shown

    def _settings_of_step(self, batch: Batch) -> Step:
        settings, number, steps_per_epoch = self.settings, self.position.step, len(self.loader)
        device, epsilon = batch.labels.device, self.epsilon(number)
        radius = torch.tensor(epsilon, device=device)
        return Step(
            ball=self.ball.with_epsilon(radius),
            epsilon=radius,
            epsilon_max=torch.tensor(self.ball.epsilon * settings.epsilon_multiplier, device=device),
            progress=number / self.steps,
            noise=Noise(key_of(self.seed, "noise", number), torch.arange(len(batch), device=device)),
            state=self.state,
            ramp=settings.schedule.done(number, steps_per_epoch),
            reached=settings.schedule.fraction(number, steps_per_epoch),
            clean=epsilon == 0,
            epoch=number // steps_per_epoch,
            epochs=settings.epochs,
            exchange=self.exchange,
        )

    def end_epoch(self, epoch: int, progress: Progress) -> None:
        """Check the weights, write the lines of the epoch and its measurements, and begin the next epoch."""
        settings, position, folder = self.settings, self.position, self.folder
        averaged = position.step == self.steps and self.average.put_into(self.model)
        if averaged or settings.precise_bn:
            recompute_statistics(self.model, self.loader.epoch(epoch))
        rate = self.optimizer.param_groups[0]["lr"]
        looked = time.monotonic()
        seen = self.monitor.check(self.model, epoch + 1)
        looking = round(time.monotonic() - looked, 3)
        line = {"kind": "epoch", "epoch": epoch + 1, "step": position.step, "learning_rate": rate}
        line |= {**self.sums.means(), "epsilon": self.epsilon(position.step - 1), **seen.figures}
        line |= {"seconds": round(self.seconds(time.monotonic()), 3), "spent": {"looking": looking}}
        folder.metrics.append(line, *({**more, "seconds": line["seconds"]} for more in seen.lines))
        progress.line(_epoch_text(line, settings.epochs, self.size))
        if seen.alarm:
            progress.alarm(seen.alarm)
        position.epoch, position.batch, position.metrics_bytes = epoch + 1, 0, folder.metrics.size()
        self.sums = _Means()

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is due: at the end, and ``checkpoint_seconds`` after the last one."""
        ended = self.monitor.halted or self.position.step == self.steps
        return ended or time.monotonic() - self.saved >= self.settings.checkpoint_seconds

    def save(self) -> None:
        self.saved = time.monotonic()
        self.position.seconds = self.seconds(self.saved)
        _save(
            self.folder, self.recipe, self.position, self.sums, self.model, self.optimizer, self.average, self.monitor,
            self.state.tensors,
        )  # fmt: skip


def _split(batch: Batch, step: Step, settings: Training) -> list[tuple[Batch, Step]]:
    """Split the batch into at most ``accumulate`` parts, each with the noise and state of its positions."""
    size = math.ceil(len(batch) / settings.accumulate)
    parts = []
    for first in range(0, len(batch), size):
        rows = slice(first, first + size)
        parts.append((batch.part(rows), step.part(rows)))
    return parts


def _epoch_text(line: dict[str, Any], epochs: int, size: str) -> str:
    """The text of an epoch's line if the output is not a terminal."""
    shown = {name: line[name] for name in SHOWN if name in line} | {size: line["epsilon"]}
    shown |= {name: value for name, value in line.items() if name.startswith("validation")}
    return f"epoch {line['epoch']}/{epochs}  {describe(shown)}  {line['seconds']:.0f} s"


def check_images(model: nn.Module, dataset: Dataset, settings: Training) -> None:
    """Check before training that the settings fit the images.

    Raises:
        InputError: the batch size leaves a batch, or part of one, with a single sample, which batch norm cannot
            normalise; no weights would be averaged; or there are no validation images to select or guard by.
    """
    samples = len(dataset.train)
    if settings.select and not len(dataset.validation):
        raise InputError(
            "training.select: found no validation images to select by; accepted: data.validation, a share in (0, 1)"
        )
    if settings.guard:
        settings.guard.check_data(dataset)
    steps = -(-samples // settings.batch_size)
    averaging = settings.averaging
    if averaging and settings.epochs * steps // averaging.every * averaging.every <= averaging.start * steps:
        raise InputError(
            f"training.averaging: found every {averaging.every} steps after {averaging.start * steps} of "
            f"{settings.epochs * steps}, which averages nothing; accepted: an earlier start, or fewer steps"
        )
    if not any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        return
    for size in {min(samples, settings.batch_size), samples % settings.batch_size} - {0}:
        part = math.ceil(size / settings.accumulate)
        if 1 in (part, size % part):
            raise InputError(
                f"training.batch_size: found {settings.batch_size} (accumulate {settings.accumulate}) for {samples} "
                "images, which leaves a batch of one to batch norm; accepted: another size"
            )


class _Means:
    """Means of figures over an epoch, weighted by batch size; each figure over the steps that report it."""

    def __init__(self, sums: dict[str, list[float]] | None = None):
        self.sums = sums or {}

    def add(self, figures: dict[str, float], weight: int) -> None:
        for name, value in figures.items():
            total, count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = [total + value * weight, count + weight]

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items()}


def _save(
    folder: RunFolder, recipe: str, position: Position, sums: _Means, model: nn.Module,
    optimizer: torch.optim.Optimizer, average: WeightAverage, monitor: EpochMonitor, tensors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    content = {"recipe": recipe, "position": vars(position), "sums": sums.sums, "model": model.state_dict(),
               "optimizer": optimizer.state_dict(), "average": average.state(), "watch": monitor.state(),
               "state": dict(tensors)}  # fmt: skip
    checkpoint.save(folder.resume, content)


def _restore(
    folder: RunFolder, recipes: tuple[str, ...], device: torch.device, model: nn.Module,
    optimizer: torch.optim.Optimizer, average: WeightAverage, monitor: EpochMonitor, tensors: dict[str, Tensor],
) -> tuple[Position, _Means]:  # fmt: skip
    content = checkpoint.load(folder.resume, device)
    checkpoint.load_weights(model, content["model"], folder.resume)
    if content["recipe"] not in recipes:
        raise InputError(f"{folder.resume}: found the checkpoint of another recipe; accepted: this run's own")
    optimizer.load_state_dict(content["optimizer"])
    average.restore(content["average"])
    monitor.restore(content["watch"])
    for name, tensor in tensors.items():
        found = content["state"].get(name)
        if found is None or found.shape != tensor.shape:
            raise InputError(
                f"{folder.resume}: {name}: found {'nothing' if found is None else tuple(found.shape)}; accepted: "
                f"{tuple(tensor.shape)}, as the loss declares it for these data"
            )
        tensor.copy_(found)
    return Position(**content["position"]), _Means(content["sums"])


def _failure_text(position: Position, error: NonFinite, folder: RunFolder) -> str:
    kept = f"the last good checkpoint is {folder.resume}" if folder.resume.exists() else "there is no checkpoint yet"
    return f"step {position.step + 1} (epoch {position.epoch + 1}): the loss is not finite ({error}); {kept}"
