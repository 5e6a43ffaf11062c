"""Training of a run from its recipe to its last file: train, certify, evaluate, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks import in_mode
from ..bounds import UnsupportedOperation
from ..bounds.folding import fold
from ..components import check_sources, load_plugins, remarks
from ..config import structure, unstructure
from ..data import Dataset
from ..environment import reproducible
from ..errors import InputError
from ..errors import check as check_value
from ..evaluation import unanswered
from ..labels import classes_of
from ..ledger import Ledger
from ..models import HE, initialise_for_ibp, initialise_he, zero_branches
from ..noise import key_of
from ..progress import console
from ..recipe import Config, load_config
from ..run_folder import RunFolder
from ..training import StopRequest, check_images, fit
from ..training.evaluation import traceable
from ..verifiers.records import decided, reasons, summarise
from .check import check
from .evaluate import evaluate_run
from .export import export_run
from .run import Run, check_data, new_folder, save_weights
from .verify import question_of


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
        InputError: an argument cannot be used; nothing on disk was changed.
        TrainingStopped: the loss or its gradient was not finite.
        Interrupted: SIGINT or SIGTERM; the run is saved.
    """
    load_plugins(plugins)
    recipe = config if isinstance(config, Config) else load_config(None if config is None else Path(config))
    recipe = structure(Config, unstructure(recipe))  # as resume reads it: checked, with 0 as 0.0
    device = recipe.resolved_device()
    with reproducible(recipe.threads, device):
        dataset, model = _prepare(recipe)
        run = Run.create(new_folder(recipe, out), recipe, dataset, device)
        if not quiet:
            console.print(f"run folder: {run.folder.path}")
            for remark in remarks(recipe):
                console.print(remark, markup=False)
        with run.folder.exclusive():
            _go_on(run, dataset, model, device, quiet)
    return run.folder


def resume(
    path: str | Path, *, device: str | None = None, plugins: Sequence[str | Path] = (), quiet: bool = False
) -> RunFolder:
    """Continue an interrupted run, bit for bit as if it had never stopped (CPU, same versions and threads).

    A finished run is unchanged; one without a checkpoint starts over.

    Args:
        path: the run's folder. device: device for training and certification; None for the recorded one.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Raises:
        InputError: there is no run, or an imported network; data or checkpoint belong to another run; or another
            process trains or exports it. Others as ``train``.
    """
    load_plugins(plugins)
    run = Run.open(path)
    if "imported" in run.description:
        raise InputError(f"{path}: found an imported network; accepted: verify and export, or a run of train")
    if _is_finished(run):
        return run.folder
    if not run.folder.final():
        check_sources(run.description, run.config)
    where = device or run.description["device"].partition(":")[0]
    run = run.with_config(device=where, threads=run.description["threads"])
    found = run.config.resolved_device()
    with run.folder.exclusive(), reproducible(run.config.threads, found):
        dataset, model = _prepare(run.config)
        check_data(dataset, run.description)
        _go_on(run, dataset, model, found, quiet)
    return run.folder


def _is_finished(run: Run) -> bool:
    """Whether training, the recipe's own certification and evaluation, and the export are done."""
    folder, config, settings = run.folder, run.config, run.config.evaluate
    if not folder.final() or (config.export.enabled and not run.description.get("export")):
        return False
    count = run.description["dataset"].get("test", 0)
    images = count if settings.images is None else min(settings.images, count)
    return not (settings.enabled and any(unanswered(folder, settings, config.perturbation, config.seed, images)))


def build_model(config: Config, dataset: Dataset) -> nn.Module:
    """The recipe's network with its initial weights, a function of the seed, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(config.seed, "weights"))
        model = config.model.build(dataset.shape, dataset.classes)
        initialisation = config.training.initialisation
        if initialisation in HE:
            initialise_he(model, HE[initialisation])
        if initialisation in ("shi", "shi_residual"):
            initialise_for_ibp(model, torch.Size(dataset.shape))
        if initialisation == "shi_residual":
            zero_branches(model, torch.Size(dataset.shape))
    return model


def _prepare(config: Config) -> tuple[Dataset, nn.Module]:
    """Load data and build the model, and refuse recipes that cannot work before anything is written."""
    dataset = config.data.load()
    try:
        config.perturbation.check_shape(dataset.shape)
    except InputError as error:
        raise InputError(f"perturbation.{error}") from error
    try:
        model = build_model(config, dataset)
        if config.certify.enabled or config.export.enabled:
            fold(model, torch.Size(dataset.shape))
    except UnsupportedOperation as error:
        without = "training.initialisation default, certify.enabled false, export.enabled false"
        raise InputError(f"model: {error}; accepted without bounds: {without}") from error
    traceable(model, torch.Size(dataset.shape))  # a forward that reads sizes is known by its shape from here on
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
    """Check that the network has one output for each class; a user's architecture may have others."""
    with in_mode(model, training=False):
        outputs = classes_of(model(dataset.train.pixels(torch.tensor([0]))))
    check_value(outputs == dataset.classes, "model", f"{outputs} outputs", f"{dataset.classes}, one for each class")


def _go_on(run: Run, dataset: Dataset, model: nn.Module, device: torch.device, quiet: bool) -> None:
    """Do the remaining work of a run."""
    config = run.config
    if not quiet and (remark := config.perturbation.remark(dataset.shape)):
        console.print(remark)
    if not run.folder.final():
        here = dataset.to(device)
        _train(run, here, model.to(device), quiet)
        if config.certify.enabled and config.certify.proofs:  # they are about the exported network
            export_run(run, dataset, config.perturbation, None, config.export, quiet)
        final = _certify(run, here, model, device, quiet) if config.certify.enabled else {}
        seconds = [line["seconds"] for line in run.folder.metrics][-1] + final.pop("seconds", 0)
        line = {"kind": "final", "epsilon": config.perturbation.epsilon, **final, "seconds": round(seconds, 3)}
        run.folder.metrics.append(line)
    if config.evaluate.enabled:
        evaluate_run(run, dataset, None, device, quiet)
    if config.export.enabled and not (config.certify.proofs and run.exported_network()):
        export_run(run, dataset, config.perturbation, None, config.export, quiet)


def _train(run: Run, dataset: Dataset, model: nn.Module, quiet: bool) -> None:
    folder, config = run.folder, run.config
    with StopRequest() as stop:
        best = fit(
            model, dataset, loss=config.loss, ball=config.perturbation, settings=config.training, seed=config.seed,
            folder=folder, stop=stop, quiet=quiet,
        )  # fmt: skip
        save_weights(folder.model, model.state_dict())
        if best.weights:
            save_weights(folder.best, best.weights)
        stop.raise_if_requested()


def _certify(run: Run, dataset: Dataset, model: nn.Module, device: torch.device, quiet: bool) -> dict[str, Any]:
    """Certify the test images and return the summary of the verdicts with their seconds, for the run's last line."""
    images = range(min(run.config.certify.images or len(dataset.test), len(dataset.test)))
    with StopRequest(at_once=True):
        question = question_of(run, dataset, model, device)
        records = Ledger(run.folder.verdicts, run.folder.settings).ask(question, images, quiet=quiet)
    proved = check(run, images=images, quiet=quiet).summary() if run.config.certify.proofs else {}
    return {
        **summarise(records), "decided": decided(records), "undecided": reasons(records), "images": len(records),
        "seconds": sum(record["seconds"] for record in records), **proved,
    }  # fmt: skip
