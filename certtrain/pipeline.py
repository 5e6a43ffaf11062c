"""Train, certify, evaluate, export: what one run does from its recipe to its last file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attacks import in_mode
from .bounds import LinfBall, PerturbationSet, UnsupportedNode
from .bounds.folding import fold
from .components import check_sources, load_plugins, remarks
from .config import structure, unstructure
from .data import Dataset
from .errors import InputError, check
from .evaluation import unanswered
from .export import Export, write_files
from .labels import classes_of
from .models import initialise_for_ibp
from .noise import key_of
from .precision import full_float32
from .progress import console
from .recipe import Config, load_config
from .robustness import evaluate_run
from .run_folder import RunFolder
from .runs import check_data, describe, load_model, question_of, recorded_config, save_weights
from .surroundings import surroundings
from .training import StopRequest, check_images, fit
from .verifiers.records import decided, reasons, summarise
from .verifiers.sweep import images_of, sweep


def train(
    config: Config | str | Path | None = None,
    out: str | Path | None = None,
    *,
    plugins: Sequence[str | Path] = (),
    quiet: bool = False,
) -> RunFolder:
    """Run a recipe from start to end: train, certify the test split, attack it, export the network.

    Args:
        config: a ``Config``, a YAML file, or None for the embedded default (digits, CC-IBP).
        out: a new or empty folder; None for a fresh one under ``runs/``.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
        quiet: print nothing.
    Returns:
        the run's folder; ``.final()`` is its summary.
    Raises:
        InputError: something given cannot be used; nothing on disk was changed.
        TrainingStopped: the loss or its gradient was not finite.
        Interrupted: SIGINT or SIGTERM; the run is saved.
    """
    load_plugins(plugins)
    recipe = config if isinstance(config, Config) else load_config(None if config is None else Path(config))
    recipe = structure(Config, unstructure(recipe))  # as resume will read it: checked, and 0 is 0.0
    device = recipe.resolved_device()
    with surroundings(recipe.threads, device):
        dataset, model = _prepare(recipe)
        folder = RunFolder.create(new_folder(recipe, out), describe(recipe, dataset, device))
        if not quiet:
            console.print(f"run folder: {folder.path}")
            for remark in remarks(recipe):
                console.print(remark, markup=False)
        with folder.alone():
            return _go_on(folder, recipe, dataset, model, device, quiet)


def resume(
    path: str | Path, *, device: str | None = None, plugins: Sequence[str | Path] = (), quiet: bool = False
) -> RunFolder:
    """Go on with an interrupted run, bit for bit as if it had never stopped (CPU, same versions and threads).

    A finished run is left as it is; one without a checkpoint starts over.

    Args:
        path: the run's folder. device: instead of the recorded one, for training and certification.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Raises:
        InputError: no run there, or an imported network; data or checkpoint are not what the run was started with;
            another process trains or exports it. Others as ``train``.
    """
    load_plugins(plugins)
    folder, description = RunFolder.open(Path(path))
    if "imported" in description:
        raise InputError(f"{path}: found an imported network; accepted: verify and export, or a run of train")
    config = recorded_config(folder, description)
    if (
        folder.final()
        and not _unevaluated(folder, config, description)
        and (description.get("export") or not config.export.enabled)
    ):
        return folder
    if not folder.final():
        check_sources(description, config)
    where = device or description["device"].partition(":")[0]
    config = structure(Config, {**unstructure(config), "device": where, "threads": description["threads"]})
    found = config.resolved_device()
    with folder.alone(), surroundings(config.threads, found):
        dataset, model = _prepare(config)
        check_data(dataset, description)
        return _go_on(folder, config, dataset, model, found, quiet)


def _unevaluated(folder: RunFolder, config: Config, description: Mapping[str, Any]) -> bool:
    """Whether the recipe asks for rows that ``evaluation.json`` does not have: another call's rows are not its own."""
    asked, count = config.evaluate, description["dataset"].get("test", 0)
    images = count if asked.images is None else min(asked.images, count)
    return asked.enabled and any(unanswered(folder, asked, config.perturbation, config.seed, images))


def build_model(config: Config, dataset: Dataset) -> nn.Module:
    """The recipe's network with its initial weights, on the CPU; a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(config.seed, "weights"))
        model = config.model.build(dataset.shape, dataset.classes)
        if config.training.initialisation == "shi":
            initialise_for_ibp(model)
    return model


def _prepare(config: Config) -> tuple[Dataset, nn.Module]:
    """Data and model; what cannot work is refused here, before anything is written."""
    dataset = config.data.load()
    try:
        config.perturbation.check_shape(dataset.shape)
    except InputError as error:
        raise InputError(f"perturbation.{error}") from error
    try:
        model = build_model(config, dataset)
        if config.certify.enabled or config.export.enabled:
            fold(model, torch.Size(dataset.shape))
    except UnsupportedNode as error:
        without = "training.initialisation default, certify.enabled false, export.enabled false"
        raise InputError(f"model: {error}; accepted without bounds: {without}") from error
    config.loss.check_model(model)
    config.loss.check_ball(config.perturbation)
    config.training.check_ball(config.perturbation)
    config.certify.check_ball(config.perturbation)
    config.training.update.check_loss(config.loss)
    if config.evaluate.enabled:
        config.evaluate.check_ball(config.perturbation, dataset.test.pixels(torch.tensor([0])), model)
        if "best" in config.evaluate.checkpoints and not config.training.select:
            raise InputError("evaluate.checkpoints: found best; accepted: last, or a training.select that keeps one")
    _check_outputs(model, dataset)
    check_images(model, dataset, config.training)
    config.training.augment.check_shape(dataset.shape)
    config.training.augment.check_state(config.loss.declare_state(dataset.shape, dataset.classes))
    return dataset, model


@torch.no_grad()
def _check_outputs(model: nn.Module, dataset: Dataset) -> None:
    """An architecture of the user's own may have others than one for each class."""
    with in_mode(model, training=False):
        outputs = classes_of(model(dataset.train.pixels(torch.tensor([0]))))
    check(outputs == dataset.classes, "model", f"{outputs} outputs", f"{dataset.classes}, one for each class")


def _go_on(
    folder: RunFolder, config: Config, dataset: Dataset, model: nn.Module, device: torch.device, quiet: bool
) -> RunFolder:
    if not quiet and (remark := config.perturbation.remark(dataset.shape)):
        console.print(remark)
    if not folder.final():
        _train_and_certify(folder, config, dataset, model, device, quiet)
    if config.evaluate.enabled:
        evaluate_run(folder, dataset, config, None, device, quiet)
    if config.export.enabled:
        _export(folder, dataset, config.perturbation, None, config.export, quiet)
    return folder


def _train_and_certify(
    folder: RunFolder, config: Config, dataset: Dataset, model: nn.Module, device: torch.device, quiet: bool
) -> None:
    model.to(device)
    here = dataset.to(device)
    with StopRequest() as stop:
        best = fit(
            model, here, loss=config.loss, ball=config.perturbation, settings=config.training, seed=config.seed,
            folder=folder, stop=stop, quiet=quiet,
        )  # fmt: skip
        save_weights(folder.model, model.state_dict())
        if best.weights:
            save_weights(folder.best, best.weights)
        stop.raise_if_asked()
    final = {"kind": "final", "epsilon": config.perturbation.epsilon}
    seconds = [line["seconds"] for line in folder.metrics][-1]
    if config.certify.enabled:
        images = range(min(config.certify.images or len(here.test), len(here.test)))
        with StopRequest(at_once=True):
            question = question_of(folder, config, here, model, device)
            records = sweep(question, folder.verdicts, folder.settings, images, quiet=quiet)
        final |= {**summarise(records), "decided": decided(records), "undecided": reasons(records),
                  "images": len(records)}  # fmt: skip
        seconds += sum(record["seconds"] for record in records)
    folder.metrics.append({**final, "seconds": round(seconds, 3)})


def export(
    path: str | Path,
    *,
    images: str | range | None = None,
    epsilon: float | None = None,
    timeout: float | None = None,
    plugins: Sequence[str | Path] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a run's files for other verifiers: ``model.onnx``, ``specs/``, ``instances.csv``, ``abcrown.yaml``.

    Args:
        path: the folder of a run whose training is finished.
        images: of which test images to write properties, ``"start:stop"`` or a range; None for the recipe's.
        epsilon: their radius in pixel units; None for the run's.
        timeout: seconds that they ask for; None for the recipe's.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Returns:
        what ``run.json`` then says under ``export``.
    Raises:
        InputError: something given cannot be used, the network cannot be exported, or another process trains or exports
            this run; nothing on disk was changed.
    """
    load_plugins(plugins)
    folder, description = RunFolder.open(Path(path))
    config = recorded_config(folder, description)
    ball = config.perturbation if epsilon is None else config.perturbation.with_epsilon(float(epsilon))
    settings = config.export if timeout is None else dataclasses.replace(config.export, timeout=timeout)
    dataset = config.data.load()
    check_data(dataset, description)
    with folder.alone():
        return _export(folder, dataset, ball, images, settings, quiet)


def _export(
    folder: RunFolder,
    dataset: Dataset,
    ball: PerturbationSet,
    images: str | range | None,
    settings: Export,
    quiet: bool,
) -> dict[str, Any]:
    """The network is the one in the folder, whatever was trained just now."""
    model, _ = load_model(folder.path)
    count = len(dataset.test)
    default = range(count if settings.images is None else min(settings.images, count))
    chosen = default if images is None else images_of(images, count)
    with full_float32():
        found = write_files(folder, model, dataset.test, dataset.classes, ball, chosen, settings.timeout)
    if not quiet:
        network = found["network"]
        properties = f"{found['properties']} properties at epsilon {found['epsilon']:.6g}"
        if not isinstance(ball, LinfBall):
            properties = f"no properties, which state boxes: found a {type(ball).__name__}"
        console.print(
            f"exported: {folder.onnx} (onnxruntime differs by {network['difference']:.1e} of logits up to "
            f"{network['magnitude']:.1f}), {properties}"
        )
    return found


def new_folder(config: Config, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    stem = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = (Path("runs") / (stem + suffix) for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in candidates if not path.exists())
