"""What a run's folder says of one trial: how far it is, its accuracies, its time."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config import flatten, unstructure
from ..errors import InputError
from ..recipe import Config
from ..run_folder import RunFolder, sha256
from ..runs import recorded_config
from .study import Trial

Stage = Literal["missing", "interrupted", "trained", "evaluated"]
Key = tuple[str, str, float | None]
"""Checkpoint, attack (``clean``, ``ibp`` and ``certified`` among them), epsilon; None for ``clean``."""

ASKED = {f"evaluate.{name}" for name in ("enabled", "attacks", "epsilons", "images", "checkpoints")}
"""What may be asked anew of a network that was trained already."""


@dataclass(frozen=True)
class Result:
    """One trial's numbers.

    Args:
        accuracies: shares of the test images.
        images: how many they were, of each accuracy.
        seconds: the median epoch of training. None before the first one.
        made_by: versions, device, threads: what times and, in the last digits, accuracies depend on.
    """

    trial: Trial
    accuracies: Mapping[Key, float]
    images: Mapping[Key, int]
    seconds: float | None
    made_by: Mapping[str, str]


def result_of(trial: Trial) -> Result | None:
    """What is there; None where there is no run yet.

    Raises:
        InputError: the folder is of another recipe, or a file in it is not as written.
    """
    if not RunFolder(trial.path).run.exists():
        return None
    folder, description = RunFolder.open(trial.path)
    accuracies, images = {}, {}
    for row in evaluated(folder):
        accuracies[key_of_row(row)], images[key_of_row(row)] = row["accuracy"], row["images"]
    final = folder.final() or {}
    if final.get("certified_accuracy") is not None:
        key = "last", "certified", final["epsilon"]
        accuracies[key], images[key] = final["certified_accuracy"], final["images"]
    made_by = {
        **_summary(folder).get("versions", {}), **description.get("versions", {}),
        "device": description.get("device_name") or description["device"], "threads": description["threads"],
    }  # fmt: skip
    return Result(trial, accuracies, images, _seconds(folder), {name: str(value) for name, value in made_by.items()})


def stage_of(trial: Trial) -> Stage:
    """How far the trial is."""
    folder = RunFolder(trial.path)
    if not folder.run.exists():
        return "missing"
    exported = not trial.config.export.enabled or folder.open(trial.path)[1].get("export")
    if not (folder.final() and exported):
        return "interrupted"
    return "trained" if any(unanswered(trial)) else "evaluated"


def unanswered(trial: Trial) -> Iterator[Key]:
    """What the study asks of these weights and is not in ``evaluation.json``."""
    folder, description = RunFolder.open(trial.path)
    asked, count = trial.config.evaluate, description["dataset"].get("test", 0)
    images = count if asked.images is None else min(asked.images, count)
    checkpoints = asked.checkpoints or (("last", "best") if folder.best.exists() else ("last",))
    weights = {name: sha256(file) for name in checkpoints if (file := folder.weights_of(name)).exists()}
    there = {
        key_of_row(row)
        for row in evaluated(folder)
        if row["images"] == images and row["weights_sha256"] == weights.get(row["checkpoint"])
    }
    for checkpoint in checkpoints:
        keys = [(checkpoint, "clean", None)]
        keys += [(checkpoint, attack, epsilon) for epsilon in epsilons_of(trial.config) for attack in asked.attacks]
        yield from (key for key in keys if key not in there)


def epsilons_of(config: Config) -> tuple[float, ...]:
    """At which radii a recipe is evaluated."""
    return config.evaluate.epsilons or (float(config.perturbation.epsilon),)


def key_of_row(row: Mapping[str, Any]) -> Key:
    return row["checkpoint"], row["attack"], None if row["attack"] == "clean" else row["epsilon"]


def check_recipe(trial: Trial) -> None:
    """
    Raises:
        InputError: the folder's run was started with another recipe; names the field.
    """
    folder, description = RunFolder.open(trial.path)
    found, wanted = (flatten(unstructure(c)) for c in (recorded_config(folder, description), trial.config))
    for field in [*wanted, *found]:
        if field not in ASKED and found.get(field) != wanted.get(field):
            raise InputError(
                f"{trial.path}: {field}: found a run with {found.get(field)!r}; accepted: {wanted.get(field)!r}, as "
                "the study says, or another --out"
            )


def evaluated(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of ``evaluation.json``; none where there is none."""
    return _summary(folder).get("rows", [])


def _summary(folder: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(folder.evaluation.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder.evaluation}: cannot be read ({error}); accepted: the file as written") from error


def _seconds(folder: RunFolder) -> float | None:
    """The median over epochs: what a process does once, and measurements that not every epoch has, do not count."""
    ends = [line["seconds"] for line in folder.metrics if line["kind"] == "epoch"]
    return statistics.median(end - start for start, end in itertools.pairwise([0.0, *ends])) if ends else None
