"""Write a run's files for other verifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bounds import PerturbationSet
from ..components import load_plugins
from ..data import Dataset
from ..export import Export, write_files
from ..ledger import images_of
from ..precision import full_float32
from ..progress import console
from .run import Run


def export(
    path: str | Path | Run,
    *,
    images: str | range | None = None,
    epsilon: float | None = None,
    timeout: float | None = None,
    vnnlib_version: float | None = None,
    plugins: Sequence[str | Path] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a run's files for other verifiers: ``model.onnx``, ``specs/``, ``instances.csv``, ``abcrown.yaml``.

    Args:
        path: the folder of a run whose training is finished, or the run opened.
        images: test images for which properties are written, ``"start:stop"`` or a range; None for the recipe's.
        epsilon: radius of the properties in pixel units; None for the run's.
        timeout: seconds per property; None for the recipe's.
        vnnlib_version: version of VNN-LIB of the properties, 1.0 or 2.0; None for the recipe's.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Returns:
        the section ``export`` of ``run.json``.
    Raises:
        InputError: an argument cannot be used, the network cannot be exported, or another process trains or exports
            this run; nothing on disk was changed.
    """
    load_plugins(plugins)
    run = Run.open(path)
    ball = run.config.perturbation if epsilon is None else run.config.perturbation.with_epsilon(float(epsilon))
    given = {"timeout": timeout, "vnnlib_version": vnnlib_version}
    settings = replace(run.config.export, **{name: value for name, value in given.items() if value is not None})
    dataset = run.dataset()
    with run.folder.exclusive():
        return export_run(run, dataset, ball, images, settings, quiet)


def export_run(
    run: Run, dataset: Dataset, ball: PerturbationSet, images: str | range | None, settings: Export, quiet: bool
) -> dict[str, Any]:
    """Run ``export`` on a loaded data set. The caller holds the folder's lock; the network is read from the folder."""
    model, folder = run.model(), run.folder
    count = len(dataset.test)
    default = range(count if settings.images is None else min(settings.images, count))
    chosen = default if images is None else images_of(images, count)
    with full_float32():
        found = write_files(
            folder, model, dataset.test, dataset.classes, ball, chosen, settings.timeout, settings.vnnlib_version
        )
    if not quiet:
        network = found["network"]
        properties = f"{found['properties']} properties at epsilon {found['epsilon']:.6g}"
        if not ball.is_box:
            properties = f"no properties, which state boxes: found a {type(ball).__name__}"
        console.print(
            f"exported: {folder.onnx} (onnxruntime differs by {network['difference']:.1e} of logits up to "
            f"{network['magnitude']:.1f}), {properties}"
        )
    return found
