"""An opened run: folder, recipe and description; weights and images are loaded on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..components import check_sources, load_plugins, sources_of, with_file
from ..config import structure, unstructure, with_null_defaults
from ..data import Dataset
from ..environment import device_name, versions
from ..errors import InputError, check
from ..export import current_network
from ..recipe import Config
from ..run_folder import RunFolder, write_atomically
from ..training.checkpoint import load_weights

FORMAT = 2
"""Format of a recorded recipe. Format 1, which is not recorded, held the norm balls' default attack where the set's
default is now null."""


def describe(config: Config, dataset: Dataset, device: torch.device) -> Mapping[str, Any]:
    """The content of ``run.json``: everything needed to repeat the run."""
    plugins = sources_of(config)
    return {
        "format": FORMAT,
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


@dataclass(frozen=True)
class Run:
    """A run on disk. Its recipe is read once, weights and images on request.

    Args:
        folder: the files of the run.
        description: content of ``run.json`` when the run was opened.
        recorded: the recipe with which the run was started.
        config: the current recipe: the recorded one, or one with other settings (``with_config``).
    """

    folder: RunFolder
    description: Mapping[str, Any]
    recorded: Config
    config: Config

    @classmethod
    def open(cls, run: str | Path | Run) -> Run:
        """Open the run in a folder; an opened run is returned unchanged.

        Raises:
            InputError: there is no run, or its ``run.json`` is not as written.
        """
        if isinstance(run, Run):
            return run
        folder, description = RunFolder.open(Path(run))
        config = recorded_config(folder, description)
        return cls(folder, description, config, config)

    @classmethod
    def create(cls, path: Path, config: Config, dataset: Dataset, device: torch.device, **sections: Any) -> Run:
        """Begin a run in a new or empty folder; ``sections`` are added to ``run.json``.

        Raises:
            InputError: the folder already holds something.
        """
        description = {**describe(config, dataset, device), **sections}
        return cls(RunFolder.create(path, description), description, config, config)

    def with_config(self, **fields: Any) -> Run:
        """The same run with other settings, checked like the fields of a recipe.

        Args:
            fields: fields of ``Config``, each as a value or as a mapping as in YAML.
        Raises:
            InputError: a field that cannot be, or another model, whose weights are not those in the folder.
        """
        mapping = {**unstructure(self.config), **{name: unstructure(value) for name, value in fields.items()}}
        config = structure(Config, mapping)
        check(config.model == self.recorded.model, "model", config.model, f"{self.recorded.model}, the run's")
        return replace(self, config=config)

    def model(self, checkpoint: Literal["last", "best"] = "last") -> nn.Module:
        """The trained network, read from disk, in evaluation mode on the CPU.

        Raises:
            InputError: there are no such weights, or they belong to another architecture.
        """
        shape, classes = self.description["dataset"]["shape"], self.description["dataset"]["classes"]
        file = self.folder.weights_of(checkpoint)
        try:
            weights = safetensors.torch.load_file(file)
        except FileNotFoundError as error:
            accepted = f"a run whose training is finished, see --resume {self.folder.path}"
            if checkpoint == "best" and self.folder.model.exists():
                accepted = "the last checkpoint, or a run whose recipe keeps the best one (training.select)"
            raise InputError(f"{file}: found no weights; accepted: {accepted}") from error
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{file}: cannot be read ({error}); accepted: a finished training's file") from error
        model = self.config.model.build(tuple(shape), classes)
        load_weights(model, weights, file)
        for name, value in weights.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise InputError(f"{file}: {name}: found a value that is not finite; accepted: finite weights")
        return model.eval()

    def dataset(self) -> Dataset:
        """The images with which the run was started, on the CPU.

        Raises:
            InputError: the images have changed.
        """
        dataset = self.config.data.load()
        check_data(dataset, self.description)
        return dataset

    def exported_network(self) -> Path | None:
        """``model.onnx`` if it was exported from the current weights, else None.

        Read from disk, because an export may have happened since the run was opened.
        """
        return current_network(self.folder, RunFolder.open(self.folder.path)[1])


def load_model(
    path: str | Path, checkpoint: Literal["last", "best"] = "last", *, plugins: Sequence[str | Path] = ()
) -> tuple[nn.Module, Config]:
    """The trained network of a run, in evaluation mode on the CPU, and the run's recipe.

    Args:
        path: the run's folder.
        checkpoint: ``last``, or ``best``, the one kept by ``training.select``.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Raises:
        InputError: there is no run, it has no such weights, or they belong to another architecture.
    """
    load_plugins(plugins)
    run = Run.open(path)
    return run.model(checkpoint), run.config


def recorded_config(folder: RunFolder, description: Mapping[str, Any]) -> Config:
    """The recipe with which a run was started.

    Raises:
        InputError: the recipe is not as written; it names a user's class that is not loaded; or the run's network or
            perturbation set is a user's class whose text has changed.
    """
    try:
        config = structure(Config, description["config"])
    except InputError as error:
        raise InputError(f"{folder.run}: {with_file(str(error), description)}") from error
    check_sources(description, config.model, config.perturbation)
    return as_recorded(config, description)


def as_recorded(config: Config, description: Mapping[str, Any]) -> Config:
    """A recipe as the format of ``description`` tells it: the first does not tell a set's default attack from none."""
    return config if description.get("format", 1) == FORMAT else with_null_defaults(config)


def check_data(dataset: Dataset, description: Mapping[str, Any]) -> None:
    """Check that these are the images with which the run was started.

    Raises:
        InputError: they are other images.
    """
    found, wanted = dataset.checksum, description["dataset"]["sha256"]
    if found != wanted:
        raise InputError(
            f"data: found images with sha256 {found[:12]}…; accepted: those that the run was started "
            f"with, {wanted[:12]}…"
        )


def save_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors`` or another weight file, whole or not at all."""
    found = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_atomically(file, lambda temporary: temporary.write_bytes(safetensors.torch.save(found)))


def new_folder(config: Config, out: str | Path | None) -> Path:
    """``out``, or a new folder under ``runs/`` named by the recipe and the time."""
    if out is not None:
        return Path(out)
    stem = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = (Path("runs") / (stem + suffix) for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in candidates if not path.exists())
