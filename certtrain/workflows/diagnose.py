"""Diagnosis of a finished run's network: numbers and figures of its loss around training images and its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..bounds import PerturbationSet
from ..components import load_plugins
from ..config import unstructure
from ..diagnostics import DIAGNOSTICS, Subject, check_balls, check_names, spread, those_for
from ..diagnostics.figures import FIGURES, draw_epochs, save
from ..environment import device_name, reproducible, versions
from ..errors import check
from ..locking import exclusive, lock_of
from ..noise import Noise, key_of
from ..progress import Progress
from ..run_folder import RunFolder, sha256, write_json
from ..training import StopRequest
from .run import Run

Checkpoint = Literal["last", "best"]
CHECKPOINTS = ("last", "best")
EPOCHS = "epochs"
"""Name of the figure of the diagnoses along training (``training.diagnose``)."""


@dataclass(frozen=True)
class Diagnosis:
    """The results of ``diagnose``.

    Args:
        file: ``diagnostics.json``.
        figures: the PNG files, in the order of the diagnostics.
        content: the file's content.
    """

    file: Path
    figures: list[Path]
    content: dict[str, Any]


def diagnose(
    path: str | Path | Run,
    *,
    checkpoint: Checkpoint = "last",
    images: int = 1000,
    what: Sequence[str] | None = None,
    top: int = 10,
    perturbation: PerturbationSet | None = None,
    device: str | None = None,
    plugins: Sequence[str | Path] = (),
    quiet: bool = False,
) -> Diagnosis:
    """Diagnose the network of a run whose training is finished, on images spread evenly over its training split.

    Writes ``diagnostics.json`` and ``figures/*.png`` into the run's folder and replaces those of an earlier call. The
    numbers are the same as those of ``training.diagnose`` along training; the test split is not used.

    Args:
        path: the run's folder, or the run opened.
        checkpoint: the ``last`` weights or the ``best``.
        images: number of images; all of a smaller split.
        what: some of ``certtrain.diagnostics.DIAGNOSTICS``; None for all that support the perturbation set.
        top: number of eigenvalues of the weights' Hessians.
        perturbation: perturbation set; None for the recipe's.
        device: device to compute on; None for the recipe's.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Raises:
        InputError: an argument cannot be used, or another process diagnoses this run; nothing on disk was changed.
        Interrupted: SIGINT or SIGTERM; nothing on disk was changed.
    """
    load_plugins(plugins)
    if what is not None:
        check_names("what", what)
    check(checkpoint in CHECKPOINTS, "checkpoint", checkpoint, ", ".join(CHECKPOINTS))
    check(images >= 1, "images", images, "a whole number >= 1")
    check(top >= 1, "top", top, "a whole number >= 1")
    run = Run.open(path)
    model, folder = run.model(checkpoint), run.folder
    config = run.with_config(device=device or run.config.device).config
    ball = config.perturbation if perturbation is None else perturbation
    chosen = those_for(ball) if what is None else list(dict.fromkeys(what))
    check_balls("what", chosen, ball)
    where = config.resolved_device()
    file = folder.path / "diagnostics.json"
    with exclusive(lock_of(file), str(file)):
        with reproducible(config.threads, where), StopRequest(at_once=True):
            dataset = run.dataset()
            ball.check_shape(dataset.shape)
            batch = spread(dataset.train.to(where), images)
            noise = Noise(key_of(config.seed, "diagnose"), batch.index)
            subject = Subject(model.to(where), batch, ball, noise, top=top)
            content: dict[str, Any] = {
                "checkpoint": checkpoint, "weights": sha256(folder.weights_of(checkpoint)), "split": "train",
                "images": len(batch), "seed": config.seed,
                "perturbation": unstructure(ball), "epsilon": float(ball.epsilon),
                "one_step": unstructure(subject.one), "attack": unstructure(subject.many),
                "versions": versions(), "device": device_name(where),
            }  # fmt: skip
            with Progress("diagnosing", len(chosen), quiet=quiet) as progress:
                for name in chosen:
                    progress.now(name)
                    content |= DIAGNOSTICS[name](subject)
                    progress.advance(1)
        return _written(file, folder, chosen, content)


def _written(file: Path, folder: RunFolder, chosen: list[str], content: dict[str, Any]) -> Diagnosis:
    title = f"{folder.path.resolve().name}, {content['checkpoint']} weights\n{_words(content['perturbation'])}"
    drawn = {name: draw(content, title) for name, draw in FIGURES.items() if name in chosen}
    if lines := [line for line in folder.metrics if line.get("kind") == "diagnosis"]:
        drawn[EPOCHS] = draw_epochs(lines, folder.path.resolve().name)
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)  # JSON has no NaN: null stands for it
    figures = folder.path / "figures"
    for name in (*FIGURES, EPOCHS):
        place = figures / f"{name}.png"
        if name in drawn:
            save(drawn[name], place)
        else:
            place.unlink(missing_ok=True)
    write_json(file, content)
    return Diagnosis(file, [figures / f"{name}.png" for name in drawn], content)


def _words(perturbation: Mapping[str, Any]) -> str:
    """The perturbation set in words, such as ``SparseBall k 20 unit pixel side 1``."""
    fields = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
              for name, value in perturbation.items() if name != "type")  # fmt: skip
    return " ".join((perturbation["type"], *fields))
