"""The recipe: one frozen dataclass with the sections of the YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .bounds import LinfBall, PerturbationSet
from .config import override, read_yaml, structure
from .data import Digits, Source
from .errors import InputError, check
from .evaluation import Evaluate
from .export import Export
from .losses import CcIbp, Loss
from .models import Architecture, SmallCnn
from .training import Training
from .verifiers import Certify


@dataclass(frozen=True)
class Config:
    """A recipe. The default trains on scikit-learn's digits in about a minute.

    Args:
        name: name of the run's folder.
        seed: key of all random numbers of the run.
        device: ``auto`` takes CUDA if it is available.
        threads: CPU threads of torch; 0 for torch's default. Recorded, and used again on resume.
        data, model, perturbation, loss, training, certify, evaluate, export: the sections.
    """

    name: str = "digits_ccibp"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    data: Source = Digits()
    model: Architecture = SmallCnn()
    perturbation: PerturbationSet = LinfBall(epsilon=0.1)
    loss: Loss = CcIbp()
    training: Training = Training()
    certify: Certify = Certify()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    def __post_init__(self) -> None:
        check(self.name and "/" not in self.name, "name", self.name, "a name without slashes")
        check(0 <= self.threads <= 1024, "threads", self.threads, "0 to 1024")

    def resolved_device(self) -> torch.device:
        """The device to compute on.

        Raises:
            InputError: CUDA is requested and not available.
        """
        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise InputError("device: found 'cuda', but torch sees no CUDA device; accepted here: auto, cpu")
        return torch.device("cuda" if available and self.device != "cpu" else "cpu")


def load_config(path: Path | None = None, overrides: Mapping[str, str] | None = None) -> Config:
    """A recipe from a YAML file (None: the embedded default) with overrides such as ``{"loss.alpha": "0.02"}``.

    Raises:
        InputError: names the file, the field, the value found and the accepted ones.
    """
    mapping = read_yaml(path) if path else {}
    try:
        return structure(Config, override(mapping, overrides or {}))
    except InputError as error:
        raise InputError(f"{path}: {error}" if path else str(error)) from error
