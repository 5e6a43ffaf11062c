"""All diagnostics by name; results are numbers, lists and null, for a line of JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..attacks import Attack, SparseRs, default_attack
from ..bounds import NormBall, PerturbationSet, SparseBall
from ..config import unstructure
from ..errors import InputError, check
from ..noise import Noise
from ..step import Batch
from .alignment import boundary_distortion, fgsm_pgd_cosine, gradient_alignment
from .hessian import hessian_spectrum
from .interpolation import interpolation
from .landscape import landscape
from .logits import divergence_split, qub_gap
from .overlap import overlap
from .weights import adversarial_hessian, gradient_gap, weight_landscape

DENSE = 128
"""Images, at most, in a loss landscape, which passes each through the network hundreds of times."""
ATTACKED = 64
"""Images, at most, in a landscape of the weights, which attacks each at 49 points."""
SEARCHED = 256
"""The same of ``overlap``, whose attacks take a thousand passes."""
RANDOM_SEARCH = SparseRs(queries=1000)
"""Which asks the network for no gradients, and finds what they hide."""


@dataclass(frozen=True)
class Subject:
    """The network, batch and settings that diagnostics are computed for.

    Args:
        model: in any mode; left unchanged.
        noise: keyed by each of the batch's images.
        attack: the strong one; None for the set's default.
        top: eigenvalues of ``hessian`` and ``adversarial_hessian``.
    """

    model: nn.Module
    batch: Batch
    ball: PerturbationSet
    noise: Noise
    attack: Attack | None = None
    top: int = 10

    @property
    def question(self) -> tuple[nn.Module, Batch, PerturbationSet, Noise]:
        return self.model, self.batch, self.ball, self.noise

    @property
    def one(self) -> Attack:
        """The default attack of a single step."""
        return default_attack(self.ball, "one_step")

    @property
    def many(self) -> Attack:
        """The strong one, which attacks every image."""
        return self.attack or default_attack(self.ball, "many_steps")

    @property
    def search(self) -> Attack:
        """The strong one, which may end at the first wrong prediction."""
        return self.attack or default_attack(self.ball, "search")

    def some(self, count: int) -> Subject:
        """The same subject with at most so many images, evenly spread."""
        every = slice(None, None, max(1, -(-len(self.batch) // count)))
        noise = Noise(self.noise.key, self.noise.positions[every])
        return Subject(self.model, self.batch.part(every), self.ball, noise, self.attack, self.top)


@dataclass(frozen=True)
class Diagnostic:
    """A diagnostic, computed by a call.

    Args:
        ask: what it finds.
        needs: the kind of set that it needs.
    """

    ask: Callable[[Subject], dict[str, Any]]
    needs: type[PerturbationSet] = PerturbationSet

    def __call__(self, subject: Subject) -> dict[str, Any]:
        check(self.needs.matches(subject.ball), "perturbation", subject.ball.kind, f"a {self.needs.__name__}")
        return self.ask(subject)


def _alignment(subject: Subject) -> dict[str, Any]:
    return {"gradient_alignment": gradient_alignment(*subject.question)}


def _cosine(subject: Subject) -> dict[str, Any]:
    return {"fgsm_pgd_cosine": fgsm_pgd_cosine(*subject.question, attack=subject.many)}


def _distortion(subject: Subject) -> dict[str, Any]:
    return {"boundary_distortion": boundary_distortion(*subject.question)}


def _qub(subject: Subject) -> dict[str, Any]:
    found = qub_gap(*subject.question, attack=subject.many)
    return {
        "qub_gap": found.gap, "qub_centred_gap": found.centred_gap, "qub_distance": found.distance,
        "qub_curvature": found.curvature,
    }  # fmt: skip


def _split(subject: Subject) -> dict[str, Any]:
    found = divergence_split(*subject.question)
    return {"divergence": found.whole, "divergence_split": list(found.split)}


def _landscape(subject: Subject) -> dict[str, Any]:
    found = landscape(*subject.some(DENSE).question)
    return {"landscape_steps": found.steps.tolist(), "landscape_losses": found.losses.tolist()}


def _hessian(subject: Subject) -> dict[str, Any]:
    found = hessian_spectrum(subject.model, subject.batch, subject.top)
    return {"hessian_values": list(found.values), "hessian_residuals": list(found.residuals)}


def _interpolation(subject: Subject) -> dict[str, Any]:
    found = interpolation(*subject.question, attack=subject.one)
    return {
        "interpolation_shares": list(found.shares), "interpolation_accuracies": list(found.accuracies),
        "interpolation_losses": list(found.losses),
    }  # fmt: skip


def _overlap(subject: Subject) -> dict[str, Any]:
    subject = subject.some(SEARCHED)
    found: dict[str, Any] = {"overlap_first": unstructure(subject.one)}
    for name, second in (("overlap", subject.search), ("overlap_rs", RANDOM_SEARCH)):
        both = overlap(*subject.question, first=subject.one, second=second)
        found |= {
            name: both.overlap, f"{name}_jaccard": both.jaccard, f"{name}_chance": both.chance,
            f"{name}_distance": both.distance, f"{name}_sizes": list(both.sizes), f"{name}_images": both.images,
            f"{name}_second": unstructure(second),
        }  # fmt: skip
    return found


def _adversarial_hessian(subject: Subject) -> dict[str, Any]:
    found = adversarial_hessian(*subject.question, attack=subject.many, top=subject.top)
    return {
        "adversarial_hessian_values": list(found.values), "adversarial_hessian_residuals": list(found.residuals),
    }  # fmt: skip


def _weight_landscape(subject: Subject) -> dict[str, Any]:
    some = subject.some(ATTACKED)
    found = weight_landscape(*some.question, attack=some.many)
    return {
        "weight_landscape_steps": found.steps.tolist(), "weight_landscape_losses": found.losses.tolist(),
        "weight_landscape_values": list(found.values), "weight_landscape_index": some.batch.index.tolist(),
    }  # fmt: skip


def _gradient_gap(subject: Subject) -> dict[str, Any]:
    found = gradient_gap(*subject.question, one=subject.one, many=subject.many)
    return {"gradient_gap": found.gap, "gradient_gap_length": found.length}


DIAGNOSTICS: dict[str, Diagnostic] = {
    "alignment": Diagnostic(_alignment, NormBall),
    "cosine": Diagnostic(_cosine, NormBall),
    "distortion": Diagnostic(_distortion, NormBall),
    "qub": Diagnostic(_qub),
    "split": Diagnostic(_split, NormBall),
    "landscape": Diagnostic(_landscape, NormBall),
    "hessian": Diagnostic(_hessian),
    "interpolation": Diagnostic(_interpolation),
    "overlap": Diagnostic(_overlap, SparseBall),
    "adversarial_hessian": Diagnostic(_adversarial_hessian),
    "weight_landscape": Diagnostic(_weight_landscape),
    "gradient_gap": Diagnostic(_gradient_gap),
}


def usual(ball: PerturbationSet) -> list[str]:
    """The diagnostics that training runs by default, which are cheap."""
    return ["alignment", "cosine", "qub", "split"] if NormBall.matches(ball) else ["qub", "interpolation"]


def those_for(ball: PerturbationSet) -> list[str]:
    """The names of all diagnostics that know such a set."""
    return [name for name, diagnostic in DIAGNOSTICS.items() if diagnostic.needs.matches(ball)]


def check_names(field: str, names: Iterable[str]) -> None:
    """Refuse an empty list, and names of no diagnostic.

    Raises:
        FieldError: a name is of no diagnostic, or there is none.
    """
    known = all(name in DIAGNOSTICS for name in names)
    check(known and names, field, names, f"one or more of {', '.join(DIAGNOSTICS)}")


def check_balls(field: str, names: Iterable[str], ball: PerturbationSet) -> None:
    """Refuse diagnostics that do not support such a set.

    Raises:
        InputError: names the diagnostics that do.
    """
    known = those_for(ball)
    for name in names:
        if name not in known:
            raise InputError(f"{field}: found {name} for a {ball.kind}; accepted: {', '.join(known)}")
