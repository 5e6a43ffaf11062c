"""Means over seeds, and the columns of the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from ..bounds import size_name, sized
from ..evaluation import united
from .results import Key, TrialResult, epsilons_of
from .study import Row, Study

CHECKPOINTS = ("last", "best")
PROOFS = {"ibp": "certified by IBP", "crown": "certified by CROWN", "certified": "certified"}
"""Headings of the columns of certified accuracies."""


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (n - 1) of n numbers; the deviation is None for one number."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Statistic | None:
        """The statistic of the values other than None; None if there are none."""
        there = [value for value in values if value is not None]
        if not there:
            return None
        return cls(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there))


def columns(study: Study, results: Iterable[TrialResult]) -> list[Key]:
    """The columns of the table, in order: those requested by the study, then all others in the results."""
    found = {key for result in results for key in result.accuracies}
    for row in study.rows:
        attacks = row.config.evaluate.attacks
        found |= {("last", attack, epsilon) for attack in attacks for epsilon in epsilons_of(row.config)}
    requested = dict.fromkeys(attack for row in study.rows for attack in row.config.evaluate.attacks)
    attacks = ["clean", *(attack for attack in requested if attack not in PROOFS)]
    others = sorted({attack for _, attack, _ in found} - {*attacks, *PROOFS})
    order = [*attacks, *others, *PROOFS]
    found.add(("last", "clean", None))
    return sorted(found, key=lambda key: (CHECKPOINTS.index(key[0]), order.index(key[1]), key[2] or 0.0))


def accuracies(row: Row, key: Key, results: Iterable[TrialResult]) -> Statistic | None:
    return Statistic.of(result.accuracies.get(key) for result in of_row(row, results))


def seconds(row: Row, results: Iterable[TrialResult]) -> Statistic | None:
    """Seconds of training per epoch."""
    return Statistic.of(result.seconds for result in of_row(row, results))


def ratio(row: Row, reference: str, results: Iterable[TrialResult]) -> float | None:
    """Mean seconds divided by those of the reference; None if one is missing or from another machine."""
    results = list(results)
    own, other = of_row(row, results), [result for result in results if result.trial.row.label == reference]
    machines = {(result.made_by["device"], result.made_by["threads"]) for result in (*own, *other)}
    above, below = (Statistic.of(result.seconds for result in some) for some in (own, other))
    if above is None or below is None or len(machines) > 1 or not below.mean > 0:
        return None
    return above.mean / below.mean


def of_row(row: Row, results: Iterable[TrialResult]) -> list[TrialResult]:
    return [result for result in results if result.trial.row.label == row.label]


def made_by(results: Iterable[TrialResult]) -> Mapping[str, list[str]]:
    """All versions, devices and thread counts that computed the numbers."""
    return united(versions for result in results for versions in (result.made_by, *result.evaluated_by))


def kind_of(study: Study) -> str:
    """The class name of the rows' perturbation sets; ``""`` if they differ."""
    kinds = {row.config.perturbation.kind for row in study.rows}
    return kinds.pop() if len(kinds) == 1 else ""


def heading(key: Key, checkpoints: bool, kind: str = "") -> str:
    """The heading of a column, such as ``pgd-50-10, 8/255``, or ``spgd-u-100, k 20`` for sparse sets; with the
    checkpoint if there are two."""
    checkpoint, attack, epsilon = key
    size = [] if epsilon is None else [radius(epsilon) if size_name(kind) == "epsilon" else sized(kind, epsilon)]
    return ", ".join([PROOFS.get(attack, attack), *size, *([checkpoint] if checkpoints else [])])


def radius(epsilon: float) -> str:
    """A radius as text: ``0.03137…`` → ``8/255``, ``0.1`` → ``0.1``."""
    whole = Fraction(round(epsilon * 255))
    exact = whole and math.isclose(float(whole / 255), epsilon, rel_tol=1e-9)
    return f"{whole}/255" if exact and epsilon < 0.2 else f"{epsilon:.6g}"
