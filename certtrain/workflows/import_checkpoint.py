"""Import a checkpoint of a network trained elsewhere as a run."""

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
        _report(run.folder, found.record)
    return run.folder


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
