"""Import a checkpoint as a run folder: checks, weights, and the record in ``run.json``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bounds.folding import fold
from ..config import structure, unstructure
from ..data import Split
from ..errors import InputError, check
from ..models import Architecture, Gowal
from ..pipeline import new_folder
from ..progress import console
from ..recipe import Config
from ..run_folder import RunFolder, sha256
from ..runs import describe, save_weights
from ..surroundings import surroundings
from .layers import Layer, layers_of, naming
from .matching import KNOWN, expected_layers, fit
from .normalisation import Normalisation, normalisation_of
from .order import arrange
from .parity import evaluate
from .reading import IGNORED, read

IMAGES = 100
"""Test images on which the model is compared with the file's own tensors."""

TOLERANCE = 1e-4
"""Largest accepted difference of logits, relative to the largest logit. Float32 weights give 1e-14; a file in float64
loses about 1e-7 in float32; a wrong stride, padding or stabiliser changes logits by their own size."""


def import_checkpoint(
    file: str | Path,
    config: Config,
    out: str | Path | None = None,
    *,
    class_order: Literal["numbers", "text"] = "numbers",
    order: Sequence[str] = (),
    quiet: bool = False,
) -> RunFolder:
    """Import a network trained elsewhere as a run, for ``verify`` and ``export``.

    The file's tensors are matched with the architecture's by kind, order and shape. The normalisation is the file's own
    if it has one, else ``config.model``'s mean and std, else the one published for the data set.

    Args:
        file: a state dict as ``torch.save`` writes it, alone or in a checkpoint, or .safetensors. Read without running
            code.
        config: ``model``: the architecture. ``data``: the images it was trained for, which are read. ``perturbation``:
            the set to certify. ``certify``, ``export``, ``device``, ``threads``, ``seed``: settings of later calls.
        out: a new or empty folder; None for a fresh one under ``runs/``.
        class_order: order of the file's outputs. ``text``: 0, 1, 10, 100, 101, …, the order in which torchvision's
            ``ImageFolder`` numbers folders called 0 to K - 1 (expressive-losses' ImageNet64).
        order: the file's layers (``embed``, or a prefix that several share) in the order of computation. Needed where
            shapes and the numbers in names do not determine the order, because a .safetensors file keeps none. The
            order of a state dict is taken for that of computation.
        quiet: print nothing.
    Returns:
        the run's folder. Section ``imported`` of ``run.json`` records the file and its sha256, the old and new names of
        its tensors, the reason for their order, the weights computed from parts, the source of normalisation and batch
        norm, and the difference between our logits and those of the file's own tensors in that order.
    Raises:
        InputError: an argument cannot be used, or the file does not fit; nothing on disk was changed.
    """
    file = Path(file)
    config = structure(Config, unstructure(config))
    if type(config.model) not in KNOWN.values():
        accepted = ", ".join(kind.__name__ for kind in KNOWN.values())
        raise InputError(f"model.type: found {type(config.model).__name__}; accepted for an import: {accepted}")
    check(class_order in ("numbers", "text"), "class_order", class_order, "numbers, text")
    tensors = read(file)
    layers = layers_of(tensors.by_name, str(file))
    device = config.resolved_device()
    with surroundings(config.threads, device):
        dataset = config.data.load()
        shape, classes = dataset.shape, dataset.classes
        inside = layers.pop(0) if layers[0].kind == "normalisation" else None
        if not layers:
            raise InputError(f"{file}: found a normalisation and no layer behind it; accepted: a complete network")
        layers, ordering = arrange(
            layers, expected_layers(config.model, shape, classes), order, tensors.ordered, tensors.prefix, str(file)
        )
        fit(layers, config.model, shape, classes, str(file))
        _check_variances(layers, file)
        normalisation = normalisation_of(inside, config, naming(tensors.by_name), shape[0], file)
        architecture = dataclasses.replace(config.model, mean=normalisation.mean, std=normalisation.std)
        config = dataclasses.replace(config, model=architecture)
        # our output k is the file's output rows[k]
        rows = torch.arange(classes) if class_order == "numbers" else torch.tensor(_places_as_text(classes))
        model, renaming = _filled(architecture, [*layers[:-1], _reordered(layers[-1], rows)], shape, classes)
        fold(model, torch.Size(shape))
        parity = _parity(model, architecture, layers, inside, normalisation, rows, dataset.test, file)
        imported = {
            "file": file.name, "sha256": sha256(file),
            "layout": {"names": naming(tensors.by_name), "wrapper": tensors.wrapper, "prefix": tensors.prefix,
                       "beside": list(tensors.other_entries), "ignored": list(tensors.ignored)},
            "order": ordering, "computed": tensors.computed, "renaming": renaming,
            "normalisation": {"source": normalisation.source, "mean": list(normalisation.mean),
                              "std": list(normalisation.std)},
            "batch_norm": _batch_norm(layers), "class_order": class_order,
            "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.by_name.values()}),
            "parity": parity,
        }  # fmt: skip
        description = {**describe(config, dataset, device), "imported": imported}
        folder = RunFolder.create(new_folder(config, out), description)
        save_weights(folder.model, model.state_dict())
    if not quiet:
        _report(folder, imported)
    return folder


def _check_variances(layers: list[Layer], file: Path) -> None:
    for layer in layers:
        variance = layer.tensors.get("running_var")
        if variance is not None and not (variance >= 0).all():
            raise InputError(f"{file}: {layer.names['running_var']}: found a negative variance; accepted: numbers >= 0")


def _places_as_text(classes: int) -> list[int]:
    """The position of each class number among all of them sorted as text."""
    sorted_as_text = sorted(range(classes), key=str)
    return [sorted_as_text.index(number) for number in range(classes)]


def _reordered(layer: Layer, rows: Tensor) -> Layer:
    return dataclasses.replace(layer, tensors={role: tensor[rows] for role, tensor in layer.tensors.items()})


def _filled(
    architecture: Architecture, layers: list[Layer], shape: tuple[int, ...], classes: int
) -> tuple[nn.Module, dict[str, str]]:
    """The architecture with the file's weights, and ``{name in the file: our name}``."""
    model = architecture.build(shape, classes)
    state = model.state_dict()
    own = layers_of({name: t for name, t in state.items() if name.rpartition(".")[2] not in IGNORED}, "model")
    renaming = {}
    for found, wanted in zip(layers, own[1:] if own[0].kind == "normalisation" else own, strict=True):
        for role, name in found.names.items():
            state[wanted.names[role]] = found.tensors[role].float()
            renaming[name] = wanted.names[role]
    model.load_state_dict(state)
    return model.eval(), renaming


def _parity(
    model: nn.Module, architecture: Architecture, layers: list[Layer], inside: Layer | None,
    normalisation: Normalisation, rows: Tensor, test: Split, file: Path,
) -> dict[str, Any]:  # fmt: skip
    """Compare the model's logits with those of the file's own tensors in the order of ``layers``, both in float64.

    The comparison does not check that order.

    Raises:
        InputError: logits are not finite, or differ by more than rounding to float32 explains.
    """
    geometry = f"Gowal {architecture.size}" if isinstance(architecture, Gowal) else type(architecture).__name__
    own, outside = ([inside, *layers], ()) if inside else (layers, normalisation.mean)
    exact = copy.deepcopy(model).double()
    pairs = []
    with torch.no_grad():
        for numbers in torch.arange(min(IMAGES, len(test))).split(25):  # float64 activations of CNN7: 2 MB an image
            images = test.pixels(numbers)
            logits = evaluate(own, images, geometry, architecture.activation, outside, normalisation.std)
            pairs.append((exact(images.double()), logits[:, rows]))
    ours, theirs = (torch.cat(logits) for logits in zip(*pairs))
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not difference <= TOLERANCE * (1 + largest):  # NaN too
        raise InputError(
            f"{file}: found logits up to {largest:.3g} by the file's own tensors, which differ from the model's by "
            f"{difference:.3g}; accepted: finite logits that agree up to rounding"
        )
    labels = test.labels[: len(ours)]
    return {
        "images": len(ours), "largest_difference": difference, "largest_logit": largest,
        "same_predictions": int((ours.argmax(1) == theirs.argmax(1)).sum()),
        "correct": int((ours.argmax(1) == labels).sum()),
    }  # fmt: skip


def _batch_norm(layers: list[Layer]) -> str:
    norms = sum(layer.kind == "batch norm" for layer in layers)
    return f"in the file: {norms} layers with their running statistics" if norms else "none in the file"


def _report(folder: RunFolder, imported: dict[str, Any]) -> None:
    normalisation, parity = imported["normalisation"], imported["parity"]
    numbers = f", mean {normalisation['mean']}, std {normalisation['std']}" if normalisation["mean"] else ""
    console.print(f"imported: {folder.path} ({len(imported['renaming'])} tensors of {imported['file']})")
    console.print(f"normalisation: {normalisation['source']}{numbers}")
    console.print(f"batch norm: {imported['batch_norm']}")
    console.print(f"order of layers: {imported['order']}")
    console.print(
        f"logits differ from those of the file's tensors in this order by {parity['largest_difference']:.1e} of up to "
        f"{parity['largest_logit']:.1f}; {parity['correct']} of the first {parity['images']} test images are right"
    )
