"""Rebuild a checkpoint's network in one of our architectures: checks, weights, and the record of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds.folding import fold
from ..data import Dataset, Split
from ..errors import InputError
from ..models import Architecture, Gowal
from ..recipe import Config
from ..run_folder import sha256
from .layers import Layer, layers_of, naming
from .matching import KNOWN, expected_layers, fit
from .normalisation import Normalisation, normalisation_of
from .order import arrange
from .parity import evaluate
from .reading import IGNORED, Tensors

IMAGES = 100
"""Test images on which the model is compared with the file's own tensors."""

TOLERANCE = 1e-4
"""Largest accepted difference of logits, relative to the largest logit. Float32 weights give 1e-14; a file in float64
loses about 1e-7 in float32; a wrong stride, padding or stabiliser changes logits by their own size."""


@dataclass(frozen=True)
class Imported:
    """A checkpoint's network in one of our architectures.

    Args:
        config: the recipe that was given, with the normalisation that was found.
        model: in evaluation mode, on the CPU.
        record: what ``run.json`` says under ``imported``.
    """

    config: Config
    model: nn.Module
    record: dict[str, Any]


def check_architecture(architecture: Architecture) -> None:
    """
    Raises:
        InputError: tensors of a file cannot be matched with this architecture.
    """
    if type(architecture) not in KNOWN.values():
        accepted = ", ".join(kind.__name__ for kind in KNOWN.values())
        raise InputError(f"model.type: found {type(architecture).__name__}; accepted for an import: {accepted}")


def rebuild(
    file: Path, tensors: Tensors, layers: list[Layer], config: Config, dataset: Dataset, class_order: str,
    order: Sequence[str],
) -> Imported:  # fmt: skip
    """Put a file's tensors into ``config.model``'s architecture and compare both on test images.

    Args:
        file: to be named in errors. layers: those of ``tensors``. class_order, order: see ``import_checkpoint``.
    Raises:
        InputError: the file does not fit the architecture, or its tensors compute something else than the model.
    """
    shape, classes = dataset.shape, dataset.classes
    layers = list(layers)
    inside = layers.pop(0) if layers[0].kind == "normalisation" else None
    if not layers:
        raise InputError(f"{file}: found a normalisation and no layer behind it; accepted: a whole network")
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
    record = {
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
    return Imported(config, model, record)


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
