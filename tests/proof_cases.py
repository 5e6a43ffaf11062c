"""Proofs of small networks, for the tests of the checker and of those who write proofs."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from certtrain.bounds import LinfBall
from certtrain.export import export_onnx
from certtrain.verifiers import Certify
from certtrain.verifiers.cascade import robustness, run_cascade
from certtrain.verifiers.problem import Verdict
from certtrain.verifiers.proofs import ImageProofs, Prover


@dataclass(frozen=True)
class Case:
    """A network as a file, and the verdicts about images with their proofs."""

    model: Path
    folder: Path
    verdicts: list[Verdict]

    @property
    def proofs(self) -> list[Path]:
        return [self.folder / verdict.proof for verdict in self.verdicts if verdict.proof is not None]


def prove(
    folder: Path, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, arithmetic="real", **certify
) -> Case:
    """Export a model, and verify images with proofs."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    export_onnx(model, path, images)
    classes = int(model(images[:1]).shape[1])
    settings = Certify(**{"timeout": 20.0, "arithmetic": arithmetic, "proofs": True, **certify})
    problem = robustness(model, images, labels, torch.arange(len(images)), classes, LinfBall(epsilon))
    writer = ImageProofs(Prover(path, settings.arithmetic), folder / "proofs", "0" * 64)
    return Case(path, folder / "proofs", run_cascade(problem, settings.build(0), None, arithmetic=settings.arithmetic,
                                                     proofs=writer))  # fmt: skip


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(header, arrays) of a proof."""
    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()["proof"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write(path: Path, header: dict, arrays: dict[str, np.ndarray]) -> Path:
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(whole, path, {"proof": json.dumps(header)})
    return path
