"""Accuracy of a run on its test images under attack, beside the accuracy certified by bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..components import load_plugins
from ..config import unstructure
from ..data import Dataset
from ..environment import device_name, reproducible, versions
from ..evaluation import Checkpoint, Evaluate, Evaluation
from ..ledger import images_of
from ..progress import console
from ..run_folder import sha256
from ..training import StopRequest
from .run import Run


def evaluate(
    path: str | Path | Run,
    *,
    attacks: Sequence[str] | None = None,
    epsilons: Sequence[float] | None = None,
    images: str | range | int | None = None,
    checkpoints: Sequence[str] | None = None,
    settings: Evaluate | None = None,
    device: str | None = None,
    plugins: Sequence[str | Path] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a run whose training is finished on its test images: clean, attacked, and certified by IBP.

    The line about each image is written to ``evaluation/`` as soon as its batch is finished, and kept; the table is
    ``evaluation.json``. Arguments that are None are taken from ``settings`` or the recipe's ``evaluate`` section.

    Args:
        path: the run's folder, or the run opened.
        attacks: names such as ``pgd-50-10``, ``autoattack`` or ``sparse-autoattack``; epsilons: radii in pixel units,
            or whole numbers k; checkpoints: some of ``last`` and ``best``. See ``Evaluate``.
        images: ``"start:stop"``, a range, or the number of images from the first on.
        device: device to compute on; None for the recipe's.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Returns:
        the table, with the rows of earlier calls for the same weights.
    Raises:
        InputError: an argument cannot be used; nothing on disk was changed.
        Interrupted: SIGINT or SIGTERM; the same call continues.
        Contradiction: an attack broke an image that bounds certified.
    """
    load_plugins(plugins)
    run = Run.open(path)
    given = {"attacks": attacks, "epsilons": epsilons, "checkpoints": checkpoints}
    section = {**unstructure(settings or run.config.evaluate), **{k: v for k, v in given.items() if v is not None}}
    run = run.with_config(evaluate=section, device=device or run.config.device)
    where = run.config.resolved_device()
    with reproducible(run.config.threads, where):
        return evaluate_run(run, run.dataset(), images, where, quiet, standalone=True)


def evaluate_run(
    run: Run,
    dataset: Dataset,
    images: str | range | int | None,
    device: torch.device,
    quiet: bool,
    *,
    standalone: bool = False,
) -> dict[str, Any]:
    """Run ``evaluate`` with the recipe's section on a loaded data set; the networks are those in the folder.

    Args:
        standalone: whether this is not the end of a training, which has printed the remark on the recipe's perturbation
            set already.
    """
    folder, config, test = run.folder, run.config, dataset.test
    settings = config.evaluate
    if images is None:
        chosen = range(min(settings.images or len(test), len(test)))
    else:
        chosen = images_of(f":{images}" if isinstance(images, int) else images, len(test))
    names = settings.checkpoints or (("last", "best") if folder.best.exists() else ("last",))
    checkpoints = [
        Checkpoint(name, run.model(name).to(device), sha256(folder.weights_of(name))) for name in dict.fromkeys(names)
    ]
    made_by = {**versions(), "device": device_name(device)}
    evaluation = Evaluation(
        folder, test.to(device), config.perturbation, settings, config.seed, dataset.checksum, made_by
    )
    if not quiet:
        sets = [config.perturbation.with_epsilon(size) for size in settings.sizes(config.perturbation)]
        remarks = (one.remark(dataset.shape) for one in sets if standalone or one != config.perturbation)
        for remark in dict.fromkeys(filter(None, remarks)):
            console.print(remark)
    with StopRequest(at_once=True):
        return evaluation.run(checkpoints, chosen, quiet=quiet)
