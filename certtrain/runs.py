"""What a run's folder holds of the network: its recipe, weights, data, and the question that its verdicts answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .components import check_sources, load_plugins, sources_of, with_file
from .config import structure, unstructure
from .data import Dataset
from .errors import InputError
from .export import current_network
from .recipe import Config
from .run_folder import RunFolder, write_atomically
from .surroundings import device_name, versions
from .training.checkpoint import load_weights
from .verifiers.onnx_network import load_onnx, replay_session
from .verifiers.sweep import Question


def describe(config: Config, dataset: Dataset, device: torch.device) -> Mapping[str, Any]:
    """``run.json``: all that it takes to repeat the run."""
    plugins = sources_of(config)
    return {
        "config": unstructure(config),
        "versions": versions(),
        "seed": config.seed,
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "dataset": {
            "sha256": dataset.checksum, "shape": list(dataset.shape), "classes": dataset.classes,
            "train": len(dataset.train), "validation": len(dataset.validation), "test": len(dataset.test),
        },
        "loss_files": dict(config.loss.files()),
        **({"plugins": plugins} if plugins else {}),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }  # fmt: skip


def load_model(
    path: str | Path, checkpoint: Literal["last", "best"] = "last", *, plugins: Sequence[str | Path] = ()
) -> tuple[nn.Module, Config]:
    """The trained network of a run, in evaluation mode on the CPU, and the run's recipe.

    Args:
        path: the run's folder.
        checkpoint: ``best`` is the one that ``training.select`` kept.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Raises:
        InputError: no run there, no such weights in it, or weights of another architecture.
    """
    load_plugins(plugins)
    folder, description = RunFolder.open(Path(path))
    config = recorded_config(folder, description)
    shape, classes = description["dataset"]["shape"], description["dataset"]["classes"]
    file = folder.weights_of(checkpoint)
    try:
        weights = safetensors.torch.load_file(file)
    except FileNotFoundError as error:
        accepted = f"a run whose training is finished, see --resume {path}"
        if checkpoint == "best" and folder.model.exists():
            accepted = "the last checkpoint, or a run whose recipe keeps the best one (training.select)"
        raise InputError(f"{file}: found no weights; accepted: {accepted}") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error}); accepted: a finished training's file") from error
    model = config.model.build(tuple(shape), classes)
    load_weights(model, weights, file)
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{file}: {name}: found a value that is not finite; accepted: finite weights")
    return model.eval(), config


def recorded_config(folder: RunFolder, description: Mapping[str, Any]) -> Config:
    """The recipe that a run was started with.

    Raises:
        InputError: not as certtrain writes it; a user's class that nobody has named in this process; or the run's
            network or perturbation set is a user's class whose text is another one now.
    """
    try:
        config = structure(Config, description["config"])
    except InputError as error:
        raise InputError(f"{folder.run}: {with_file(str(error), description)}") from error
    check_sources(description, config.model, config.perturbation)
    return config


def check_data(dataset: Dataset, description: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: these are not the images that the run was started with.
    """
    found, wanted = dataset.checksum, description["dataset"]["sha256"]
    if found != wanted:
        raise InputError(
            f"data: found images with sha256 {found[:12]}…; accepted: those that the run was started "
            f"with, {wanted[:12]}…"
        )


def question_of(
    folder: RunFolder, config: Config, dataset: Dataset, model: nn.Module, device: torch.device
) -> Question:
    """The run's own question about its test split; the weights are those in the folder. Where they were exported,
    counterexamples have to fool onnxruntime too."""
    rests_on = {
        "weights": folder.weights_sha256(), "versions": versions(),
        "device": device_name(device),
    }  # fmt: skip
    network = current_network(folder, folder.open(folder.path)[1])
    replay = None if network is None else replay_session(load_onnx(network))
    return Question(
        model.eval(), dataset.test, dataset.classes, config.perturbation, config.certify, config.seed, rests_on, replay
    )


def save_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """``model.safetensors``, or another checkpoint, whole or not at all."""
    found = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_atomically(file, lambda temporary: temporary.write_bytes(safetensors.torch.save(found)))
