"""A run's files for other verifiers: network, properties of the test images, instances, settings, checksums."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ..bounds import PerturbationSet
from ..data import Split
from ..errors import check
from ..labels import check_labels, classes_of
from ..run_folder import RunFolder, sha256, write_atomically
from ..verifiers.abcrown import configuration
from ..verifiers.vnnlib import VERSIONS, check_version, write_property
from .onnx_file import export_onnx

PARITY = 1000
"""Number of test images on which onnxruntime is compared with torch."""


@dataclass(frozen=True)
class Export:
    """The recipe's ``export`` section: a run's files for other verifiers.

    Args:
        enabled: whether a run ends with an export.
        images: number of test images, from the first on, for which a property is written; null for all.
        timeout: seconds per property in ``instances.csv``.
        vnnlib_version: version of VNN-LIB of the properties, 1.0 or 2.0.
    """

    enabled: bool = True
    images: int | None = 100
    timeout: float = 60.0
    vnnlib_version: float = VERSIONS[0]

    def __post_init__(self) -> None:
        check(self.images is None or self.images >= 0, "images", self.images, "a whole number >= 0, or null")
        check(0 < self.timeout < float("inf"), "timeout", self.timeout, "seconds > 0")
        check_version("vnnlib_version", self.vnnlib_version)


def write_files(
    folder: RunFolder,
    model: nn.Module,
    split: Split,
    classes: int,
    ball: PerturbationSet,
    images: range,
    timeout: float,
    vnnlib_version: float = VERSIONS[0],
) -> dict[str, Any]:
    """Write ``model.onnx``, ``specs/NNNN.vnnlib`` for ``images``, ``instances.csv``, ``abcrown.yaml``, ``SHA256SUMS``.

    Files of an earlier export are replaced. Properties state exactly the bounds used by certificates, ``ball.ends``;
    for a set that is not a box none are written.

    Returns:
        the section ``export`` of ``run.json``.
    Raises:
        InputError: the network cannot be exported (see ``export_onnx``) or does not have one output for each class, or
            a label is not a class; nothing was changed.
    """
    check_labels(split.labels, classes)
    with torch.no_grad():
        outputs = classes_of(model.eval()(split.pixels(torch.tensor([0]))))
    check(outputs == classes, "model", f"{outputs} outputs", f"{classes}, one for each class")
    network = export_onnx(model, folder.onnx, split.pixels(torch.arange(min(PARITY, len(split)))))
    if folder.open(folder.path)[1].get("export"):
        folder.describe("export", {})  # no record vouches for the files while they change
    folder.specs.mkdir(exist_ok=True)
    names = [f"{number:04d}.vnnlib" for number in images] if ball.is_box else []
    for stale in {path.name for path in folder.specs.glob("*.vnnlib*")} - set(names):
        (folder.specs / stale).unlink()
    for name, number in zip(names, images):
        lower, upper = ball.ends(split.pixels(torch.tensor([number])).cpu())
        write_property(folder.specs / name, lower[0], upper[0], int(split.labels[number]), classes, vnnlib_version)
    rows = [(folder.onnx.name, f"{folder.specs.name}/{name}", f"{timeout:.15g}") for name in names]
    _write(folder.instances, _lines(rows))
    _write(folder.abcrown, yaml.safe_dump(configuration(timeout, "cpu"), sort_keys=False))
    files = (folder.onnx, *(folder.specs / name for name in names), folder.instances, folder.abcrown)
    _write(folder.sums, "".join(f"{sha256(path)}  {path.relative_to(folder.path)}\n" for path in files))
    record = {**dataclasses.asdict(network), "path": folder.onnx.name}
    found = {
        "weights": folder.weights_sha256(), "network": record, "epsilon": float(ball.epsilon),
        "properties": len(names), "timeout": timeout, "vnnlib_version": vnnlib_version,
        "first_image": images.start, "sums": {"path": folder.sums.name, "sha256": sha256(folder.sums)},
    }  # fmt: skip
    folder.describe("export", found)
    return found


def current_network(folder: RunFolder, description: Mapping[str, Any]) -> Path | None:
    """``model.onnx`` if it is the recorded export of the current weights, else None."""
    recorded = description.get("export", {})
    wanted = recorded.get("weights"), recorded.get("network", {}).get("sha256")
    if not folder.onnx.exists() or wanted != (folder.weights_sha256(), sha256(folder.onnx)):
        return None
    return folder.onnx


def _lines(rows: list[tuple[str, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
