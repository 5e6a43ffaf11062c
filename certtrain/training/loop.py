"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import PerturbationSet
from ..config import unstructure
from ..data import Dataset, Loader
from ..errors import InputError, Portable
from ..losses import Loss
from ..noise import Noise, key_of
from ..progress import Progress, describe
from ..run_folder import RunFolder
from ..step import Batch, State, Step
from . import checkpoint
from .averages import WeightAverage, recompute_statistics
from .evaluation import check_program
from .interruption import Interrupted, StopRequest
from .selection import Best
from .settings import Training
from .update import NonFinite
from .watch import Watch

SHOWN = ("loss", "clean_accuracy", "attacked_accuracy", "verified_accuracy")


class TrainingStopped(Portable, RuntimeError):
    """Training cannot go on; the message names the step, the terms and the last good checkpoint."""


Beside = tuple[WeightAverage, Watch]
"""What is kept beside the weights."""


@dataclass
class Position:
    """Where a run stands: ``step`` steps done, the next is ``batch`` of ``epoch`` (both 0-based)."""

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
    quiet: bool = False,
) -> Best:
    """Train ``model`` (on its device, where ``dataset`` lives too) from the start or from ``folder``'s checkpoint.

    Appends one line an epoch to ``metrics.jsonl`` and leaves a checkpoint at the end. Returns the weights that
    ``settings.select`` found best; none without it.

    Raises:
        InputError: the checkpoint is broken or belongs to another architecture; the model computes something else than
            bounds see of it (looked at before the first step and after each epoch).
        Interrupted: a signal asked to stop; the checkpoint is up to date.
        TrainingStopped: the loss or its gradient was not finite.
    """
    device = dataset.train.labels.device
    loader = Loader(dataset.train, settings.batch_size, settings.augment, seed)
    optimizer = settings.optimiser.build(model)
    specs = loss.declare_state(dataset.shape, dataset.classes)
    tensors = {
        name: spec.allocate(len(dataset.train), settings.batch_size, device, settings.augment.pad)
        for name, spec in sorted(specs.items())
    }
    parts = [unstructure(part) for part in (loss, ball, settings)]
    recipe = checkpoint.fingerprint([*parts, seed, dataset.checksum, loss.files()])
    average = WeightAverage(model, settings.averaging, len(loader))
    watch = Watch(settings, dataset, ball, seed)
    position, sums = Position(), _Means()
    if folder.resume.exists():
        position, sums = _restore(folder, recipe, device, model, optimizer, (average, watch), tensors)
    folder.metrics.truncate(position.metrics_bytes)

    steps, size = settings.epochs * len(loader), ball.size
    started = saved = time.monotonic()
    before = position.seconds
    check_program(model, dataset.train)
    model.train()
    with Progress("training", steps, done=position.step, quiet=quiet) as progress:
        for epoch in range(position.epoch, 0 if watch.halted else settings.epochs):
            for batch in loader.epoch(epoch, start=position.batch):
                settings.set_rate(optimizer, position.step / len(loader))
                torch.manual_seed(key_of(seed, "torch", position.step))  # for layers such as dropout
                epsilon = settings.epsilon(ball.epsilon, position.step, len(loader))
                step = _step(ball, epsilon, settings, seed, position.step, len(loader), batch, State(tensors, specs))
                if settings.noise is not None:
                    batch = settings.noise(batch, step)
                figures: dict[str, float] = {}
                try:
                    for replay in range(loss.replays):
                        parts = _split(batch, step if replay == 0 else step.again(replay), settings)
                        figures = settings.update(model, optimizer, loss, parts, settings.clip)
                except NonFinite as error:
                    raise TrainingStopped(_stopped(position, error, folder)) from error
                sums.add(figures, len(batch))
                position.batch, position.step = position.batch + 1, position.step + 1
                average.update(model, position.step)
                progress.advance(1, {**{name: figures[name] for name in SHOWN if name in figures}, size: epsilon})

                if position.batch == len(loader):
                    averaged = position.step == steps and average.put_into(model)
                    if averaged or settings.precise_bn:
                        recompute_statistics(model, loader.epoch(epoch))
                    rate = optimizer.param_groups[0]["lr"]
                    looked = time.monotonic()
                    seen = watch.look(model, epoch + 1)
                    looking = round(time.monotonic() - looked, 3)
                    line = {"kind": "epoch", "epoch": epoch + 1, "step": position.step, "learning_rate": rate}
                    line |= {**sums.means(), "epsilon": epsilon, **seen.figures}
                    line |= {"seconds": round(before + time.monotonic() - started, 3), "spent": {"looking": looking}}
                    folder.metrics.append(line, *({**more, "seconds": line["seconds"]} for more in seen.lines))
                    progress.line(_said(line, settings.epochs, size))
                    if seen.alarm:
                        progress.alarm(seen.alarm)
                    position.epoch, position.batch, position.metrics_bytes = epoch + 1, 0, folder.metrics.size()
                    sums = _Means()

                asked, now = stop.signal, time.monotonic()
                if asked or watch.halted or position.step == steps or now - saved >= settings.checkpoint_seconds:
                    position.seconds, saved = before + now - started, now
                    _save(folder, recipe, position, sums, model, optimizer, (average, watch), tensors)
                if asked:
                    raise Interrupted(asked)
            if watch.halted:
                break
    return watch.best


def _step(
    ball: PerturbationSet, epsilon: float, settings: Training, seed: int, number: int, steps_per_epoch: int,
    batch: Batch, state: State,
) -> Step:  # fmt: skip
    device = batch.labels.device
    radius = torch.tensor(epsilon, device=device)
    return Step(
        ball=ball.with_epsilon(radius),
        epsilon=radius,
        epsilon_max=torch.tensor(ball.epsilon * settings.epsilon_multiplier, device=device),
        progress=number / (settings.epochs * steps_per_epoch),
        noise=Noise(key_of(seed, "noise", number), torch.arange(len(batch), device=device)),
        state=state,
        ramp=settings.schedule.done(number, steps_per_epoch),
        reached=settings.schedule.fraction(number, steps_per_epoch),
        clean=epsilon == 0,
        epoch=number // steps_per_epoch,
        epochs=settings.epochs,
    )


def _split(batch: Batch, step: Step, settings: Training) -> list[tuple[Batch, Step]]:
    """The batch in at most ``accumulate`` parts, each with the noise and the state of its positions."""
    size = math.ceil(len(batch) / settings.accumulate)
    parts = []
    for first in range(0, len(batch), size):
        rows = slice(first, first + size)
        parts.append((batch.part(rows), step.part(rows)))
    return parts


def _said(line: dict[str, Any], epochs: int, size: str) -> str:
    """An epoch's line where the output is not a terminal."""
    shown = {name: line[name] for name in SHOWN if name in line} | {size: line["epsilon"]}
    shown |= {name: value for name, value in line.items() if name.startswith("validation")}
    return f"epoch {line['epoch']}/{epochs}  {describe(shown)}  {line['seconds']:.0f} s"


def check_images(model: nn.Module, dataset: Dataset, settings: Training) -> None:
    """Say before an epoch is spent what these images make impossible.

    Raises:
        InputError: the batch size leaves a batch, or a part of one, of a single sample, which batch norm cannot
            normalise; no weights would be averaged; there are no validation images to select or to guard by.
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
    """Means of figures over an epoch, weighted by batch size; each figure over the steps that had it."""

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
    optimizer: torch.optim.Optimizer, beside: Beside, tensors: dict[str, Tensor],
) -> None:  # fmt: skip
    average, watch = beside
    content = {"recipe": recipe, "position": vars(position), "sums": sums.sums, "model": model.state_dict(),
               "optimizer": optimizer.state_dict(), "average": average.state(), "watch": watch.state(),
               "state": tensors}  # fmt: skip
    checkpoint.save(folder.resume, content)


def _restore(
    folder: RunFolder, recipe: str, device: torch.device, model: nn.Module, optimizer: torch.optim.Optimizer,
    beside: Beside, tensors: dict[str, Tensor],
) -> tuple[Position, _Means]:  # fmt: skip
    content = checkpoint.load(folder.resume, device)
    checkpoint.load_weights(model, content["model"], folder.resume)
    if content["recipe"] != recipe:
        raise InputError(f"{folder.resume}: found the checkpoint of another recipe; accepted: this run's own")
    optimizer.load_state_dict(content["optimizer"])
    average, watch = beside
    average.restore(content["average"])
    watch.restore(content["watch"])
    for name, tensor in tensors.items():
        found = content["state"].get(name)
        if found is None or found.shape != tensor.shape:
            raise InputError(
                f"{folder.resume}: {name}: found {'nothing' if found is None else tuple(found.shape)}; accepted: "
                f"{tuple(tensor.shape)}, as the loss declares it for these data"
            )
        tensor.copy_(found)
    return Position(**content["position"]), _Means(content["sums"])


def _stopped(position: Position, error: NonFinite, folder: RunFolder) -> str:
    kept = f"the last good checkpoint is {folder.resume}" if folder.resume.exists() else "there is no checkpoint yet"
    return f"step {position.step + 1} (epoch {position.epoch + 1}): the loss is not finite ({error}); {kept}"
