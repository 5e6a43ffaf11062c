"""The results of one trial from its run folder: progress, accuracies, time."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..evaluation import read_rows
from ..evaluation import unanswered as unanswered_by
from ..recipe import Config
from ..run_folder import RunFolder, sha256
from .study import Trial

Stage = Literal["missing", "interrupted", "trained", "evaluated"]
Key = tuple[str, str, float | None]
"""Checkpoint, attack (``clean``, ``ibp`` and ``certified`` among them), epsilon; None for ``clean``."""


@dataclass(frozen=True)
class TrialResult:
    """One trial's numbers.

    Args:
        accuracies: shares of the test images.
        images: number of images of each accuracy.
        seconds: median seconds per epoch of training.
        made_by: versions, device and threads of the training, which determine times and last digits of accuracies.
        evaluated_by: versions and devices of the evaluations.
        data: checksum of the data.
    """

    trial: Trial
    accuracies: Mapping[Key, float]
    images: Mapping[Key, int]
    seconds: float | None
    made_by: Mapping[str, str]
    evaluated_by: Sequence[Mapping[str, str]]
    data: str


def result_of(trial: Trial) -> TrialResult | None:
    """The results of a trial; None if it is not trained yet.

    Evaluations on other images than the study's, or of other weights than those in the folder, are omitted.

    Raises:
        InputError: the folder holds a run of another recipe, or a file in it is not as written.
    """
    if not RunFolder(trial.path).run.exists() or not (final := RunFolder(trial.path).final()):
        return None
    folder, description = RunFolder.open(trial.path)
    wanted = {"first_image": 0, "images": images_to_evaluate(trial, description)}
    rows = [
        row
        for row in read_rows(folder.evaluation)
        if {**row, **wanted} == row and row.get("weights_sha256") == _weights(folder, row["checkpoint"])
    ]
    accuracies = {key_of_row(row): row["accuracy"] for row in rows}
    images = {key_of_row(row): row["images"] for row in rows}
    if final.get("certified_accuracy") is not None:
        key = "last", "certified", final["epsilon"]
        accuracies[key], images[key] = final["certified_accuracy"], final["images"]
    made_by = {
        **description.get("versions", {}), "device": description.get("device_name") or description["device"],
        "threads": description["threads"],
    }  # fmt: skip
    return TrialResult(
        trial, accuracies, images, _seconds(folder), {name: str(value) for name, value in made_by.items()},
        [versions for row in rows for versions in row.get("versions", [])], description["dataset"]["sha256"],
    )  # fmt: skip


def _weights(folder: RunFolder, checkpoint: str) -> str:
    """The checksum of the checkpoint's weights; ``""`` if there are none."""
    file = folder.weights_of(checkpoint)
    if not file.exists():
        return ""
    found = file.stat()
    return _sha256(file, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256(file: Path, size: int, changed: int) -> str:
    """The checksum of a file, cached by size and time of change, because the table is written after every run."""
    return sha256(file)


def stage_of(trial: Trial) -> Stage:
    """The progress of a trial."""
    folder = RunFolder(trial.path)
    if not folder.run.exists():
        return "missing"
    exported = not trial.config.export.enabled or folder.open(trial.path)[1].get("export")
    if not (folder.final() and exported):
        return "interrupted"
    return "trained" if any(unanswered(trial)) else "evaluated"


def unanswered(trial: Trial) -> Iterator[tuple[str, str, float]]:
    """The rows that the study requests and ``evaluation.json`` lacks for these weights."""
    folder, description = RunFolder.open(trial.path)
    config = trial.config
    yield from unanswered_by(
        folder, config.evaluate, config.perturbation, config.seed, images_to_evaluate(trial, description)
    )


def images_to_evaluate(trial: Trial, description: Mapping[str, Any]) -> int:
    """The number of test images, from the first on, that the study evaluates."""
    count, limit = description["dataset"].get("test", 0), trial.config.evaluate.images
    return count if limit is None else min(limit, count)


def epsilons_of(config: Config) -> tuple[float, ...]:
    """The sizes of the perturbation set at which a recipe is evaluated."""
    return config.evaluate.sizes(config.perturbation)


def key_of_row(row: Mapping[str, Any]) -> Key:
    return row["checkpoint"], row["attack"], None if row["attack"] == "clean" else row["epsilon"]


def _seconds(folder: RunFolder) -> float | None:
    """Median seconds per epoch without the checks after it; as a median it excludes what a process does once."""
    lines = [line for line in folder.metrics if line["kind"] == "epoch"]
    pairs = itertools.pairwise([0.0, *(line["seconds"] for line in lines)])
    spent = [line.get("spent", {}).get("looking", 0.0) for line in lines]
    return statistics.median(end - start - looking for (start, end), looking in zip(pairs, spent)) if lines else None
