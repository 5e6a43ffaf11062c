"""Make a run of a network that somebody else trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..config import structure, unstructure
from ..environment import reproducible
from ..errors import check
from ..importing import check_architecture, layers_of, read, rebuild
from ..progress import console
from ..recipe import Config
from ..run_folder import RunFolder
from .run import Run, new_folder, save_weights


def import_checkpoint(
    file: str | Path,
    config: Config,
    out: str | Path | None = None,
    *,
    class_order: Literal["numbers", "text"] = "numbers",
    order: Sequence[str] = (),
    quiet: bool = False,
) -> RunFolder:
    """Make a network that somebody else trained a run, which ``verify`` certifies and ``export`` exports.

    The file's tensors are matched with the architecture's by kind, order and shape. A normalisation in the file is
    taken from there; else it is ``config.model``'s mean and std, or else what is published for the data set.

    Args:
        file: a state dict as ``torch.save`` writes it, alone or in a checkpoint, or .safetensors. Read without running
            code.
        config: ``model``: the architecture. ``data``: the images it was trained for, which are read. ``perturbation``:
            what the run is about. ``certify``, ``export``, ``device``, ``threads``, ``seed``: for later.
        out: a new or empty folder; None for a fresh one under ``runs/``.
        class_order: of the file's outputs. ``text``: 0, 1, 10, 100, 101, …, as torchvision's ``ImageFolder`` numbers
            folders that are called 0 to K - 1, which expressive-losses makes of ImageNet64.
        order: the file's layers (``embed``, or the beginning that several share) in the order in which they are
            computed. Needed where layers could be exchanged, as far as shapes and numbers in their names tell: a
            .safetensors file keeps no order. That of a state dict is taken for the order of use.
        quiet: print nothing.
    Returns:
        the run's folder. ``run.json`` has a section ``imported``: the file and its sha256, how its tensors were
        named and what they are called now, what their order rests on, which weights were computed of parts, where
        normalisation and batch norm came from, and how far our logits are from those of the file's own tensors in
        that order.
    Raises:
        InputError: something given cannot be used, or does not fit; nothing on disk was changed.
    """
    file = Path(file)
    config = structure(Config, unstructure(config))
    check_architecture(config.model)
    check(class_order in ("numbers", "text"), "class_order", class_order, "numbers, text")
    tensors = read(file)
    layers = layers_of(tensors.by_name, str(file))
    device = config.resolved_device()
    with reproducible(config.threads, device):
        dataset = config.data.load()
        found = rebuild(file, tensors, layers, config, dataset, class_order, order)
        run = Run.create(new_folder(config, out), found.config, dataset, device, imported=found.record)
        save_weights(run.folder.model, found.model.state_dict())
    if not quiet:
        _say(run.folder, found.record)
    return run.folder


def _say(folder: RunFolder, imported: dict[str, Any]) -> None:
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
