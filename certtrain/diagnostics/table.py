"""All diagnostics by name, with what they find as numbers, lists and null: a line of JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..attacks import Attack
from ..bounds import PerturbationSet
from ..errors import check
from ..noise import Noise
from ..step import Batch
from .alignment import PGD, boundary_distortion, fgsm_pgd_cosine, gradient_alignment
from .hessian import hessian_spectrum
from .landscape import landscape
from .logits import divergence_split, qub_gap

DENSE = 128
"""Images, at most, that a landscape averages over: it passes each through the network hundreds of times."""


@dataclass(frozen=True)
class Subject:
    """What all diagnostics are asked about.

    Args:
        model: in whatever mode; left as it is.
        noise: keyed by each of the batch's images.
        attack: the strong one, of ``cosine`` and ``qub``.
        top: eigenvalues of ``hessian``.
    """

    model: nn.Module
    batch: Batch
    ball: PerturbationSet
    noise: Noise
    attack: Attack = PGD
    top: int = 10

    @property
    def question(self) -> tuple[nn.Module, Batch, PerturbationSet, Noise]:
        return self.model, self.batch, self.ball, self.noise


def _qub(subject: Subject) -> dict[str, Any]:
    found = qub_gap(*subject.question, attack=subject.attack)
    return {
        "qub_gap": found.gap, "qub_centred_gap": found.centred_gap, "qub_distance": found.distance,
        "qub_curvature": found.curvature,
    }  # fmt: skip


def _split(subject: Subject) -> dict[str, Any]:
    found = divergence_split(*subject.question)
    return {"divergence": found.whole, "divergence_split": list(found.split)}


def _landscape(subject: Subject) -> dict[str, Any]:
    some = slice(None, None, max(1, -(-len(subject.batch) // DENSE)))
    noise = Noise(subject.noise.key, subject.noise.positions[some])
    found = landscape(subject.model, subject.batch.part(some), subject.ball, noise)
    return {"landscape_steps": found.steps.tolist(), "landscape_losses": found.losses.tolist()}


def _hessian(subject: Subject) -> dict[str, Any]:
    found = hessian_spectrum(subject.model, subject.batch, subject.top)
    return {"hessian_values": list(found.values), "hessian_residuals": list(found.residuals)}


DIAGNOSTICS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "alignment": lambda subject: {"gradient_alignment": gradient_alignment(*subject.question)},
    "cosine": lambda subject: {"fgsm_pgd_cosine": fgsm_pgd_cosine(*subject.question, attack=subject.attack)},
    "distortion": lambda subject: {"boundary_distortion": boundary_distortion(*subject.question)},
    "qub": _qub,
    "split": _split,
    "landscape": _landscape,
    "hessian": _hessian,
}


def check_names(field: str, names: Iterable[str]) -> None:
    """
    Raises:
        FieldError: one of the names is of no diagnostic, or there is none.
    """
    known = all(name in DIAGNOSTICS for name in names)
    check(known and names, field, names, f"one or more of {', '.join(DIAGNOSTICS)}")
