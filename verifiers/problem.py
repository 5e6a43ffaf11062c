"""Verification problems and verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bounds import Region, memory
from ..bounds.output_forms import Margins, OutputForms
from ..errors import InputError
from ..labels import as_labels, check_labels, classes_in
from ..typed import unique
from .search_statistics import SearchStatistics, record_of_search, rounded

Status = Literal["verified", "falsified", "misclassified", "unknown", "timeout", "error"]

UNDECIDED: tuple[Status, ...] = ("unknown", "timeout", "error")


@dataclass(frozen=True, init=False)
class Specification:
    """Linear output specifications of a batch of images, in disjunctive normal form of the *unsafe* set.

    A point is unsafe if in some clause every row holds: <row, logits> + offset <= 0. Ties are unsafe.

    Args:
        forms: the rows without their offsets, ``OutputForms`` or a tensor (B, R, K); offsets: (B, R).
        clauses: (R,) int64, the clause of each row, numbered from 0.
        labels: (B,) the class that must win, for robustness specifications; None for others.
    Raises:
        InputError: no rows (such a specification would hold for every network); shapes that do not fit.
    """

    forms: OutputForms
    offsets: Tensor
    clauses: Tensor
    labels: Tensor | None = None

    def __init__(self, forms: OutputForms | Tensor, offsets: Tensor, clauses: Tensor, labels: Tensor | None = None):
        values = {"forms": OutputForms.of(forms), "offsets": offsets, "clauses": clauses, "labels": labels}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        shape = tuple(forms.shape)
        if len(shape) != 3 or not shape[1] or offsets.shape != shape[:2] or clauses.shape != shape[1:2]:
            found = f"rows {shape}, offsets {tuple(offsets.shape)}, clauses {tuple(clauses.shape)}"
            raise InputError(f"specification: found {found}; accepted: (B, R, K), (B, R) and (R,), one row or more")

    @classmethod
    def robust(cls, labels: Tensor, classes: int) -> Specification:
        """The specification that class ``labels`` wins against every other: K - 1 clauses of one row e_y - e_j, j != y
        increasing.

        Raises:
            InputError: fewer than two classes; labels that are none of them.
        """
        labels = as_labels(labels)
        classes_in((len(labels), classes))
        check_labels(labels, classes)
        forms = Margins.of_labels(labels, classes)
        clauses = torch.arange(classes - 1, device=labels.device)
        return cls(forms, torch.zeros(forms.shape[:2], device=labels.device), clauses, labels)

    @property
    def rows(self) -> Tensor:
        """(B, R, K), the rows densely: K^2 numbers for each image of a robustness specification."""
        return self.forms.dense()

    def values(self, logits: Tensor) -> Tensor:
        """(B, R) values of the rows at logits (B, K)."""
        return self.forms.values(logits) + self.offsets

    def worst_at(self, image: Tensor, logits: Tensor) -> Tensor:
        """(P,) the worst margin of the images ``image`` (P,) at logits (P, K); the images' rows are copied for a part
        of the points at a time."""
        size = max(1, memory.planned(logits) // (self.forms.numbers * logits.element_size()))
        parts = zip(torch.split(image, size), torch.split(logits, size), strict=True)
        return torch.cat([(some := self.subset(own)).worst(some.values(part)) for own, part in parts])

    def worst(self, values: Tensor) -> Tensor:
        """(B,) the minimum over clauses of the largest row in each. Where > 0 the specification holds, if ``values``
        (B, R) are row values, and is proved, if they are lower bounds.
        """
        best = values.new_full((len(values), int(self.clauses.max()) + 1), -torch.inf)
        return best.scatter_reduce(1, self.clauses.expand(len(values), -1), values, "amax").amin(1)

    def part(self, rows: Tensor) -> Specification:
        """The specification of some rows (their numbers), without labels: whole clauses, numbered anew."""
        clauses = torch.searchsorted(unique(self.clauses[rows]), self.clauses[rows])
        return Specification(self.forms.part(rows), self.offsets[:, rows], clauses)

    def subset(self, index: Tensor) -> Specification:
        labels = None if self.labels is None else self.labels[index]
        return Specification(self.forms.take(index), self.offsets[index], self.clauses, labels)


def rows_of_clauses(clauses: Tensor) -> tuple[Tensor, int]:
    """(members, C): members (C, G) int64 are the row numbers of each clause; short clauses repeat their first row.

    Raises:
        InputError: a number below the largest is no row's.
    """
    if not len(clauses):
        return clauses.reshape(0, 1), 0
    order, sizes = torch.argsort(clauses, stable=True), torch.bincount(clauses)
    if not int(sizes.min()):
        missing = int(sizes.argmin())
        raise InputError(f"specification: found no row of clause {missing} of {len(sizes)}; accepted: a row of each")
    place = torch.arange(int(sizes.max()), device=clauses.device)
    first = (sizes.cumsum(0) - sizes).unsqueeze(1)
    return order[first + torch.where(place < sizes.unsqueeze(1), place, 0)], len(sizes)


@dataclass(frozen=True)
class Problem:
    """A batch of B verification problems: does the specification hold on the whole region around each image?

    Args:
        network: in evaluation mode, float32 or float64; maps (B, *shape) to (B, K) logits.
        region: a perturbation set around B images.
        specification: B specifications.
        index: (B,) int64, each image's number in the data set, which keys the attacks' random numbers.
    """

    network: nn.Module
    region: Region
    specification: Specification
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, index: Tensor) -> Problem:
        return Problem(self.network, self.region.take(index), self.specification.subset(index), self.index[index])


@dataclass(frozen=True)
class Verdict:
    """The answer for one image.

    Args:
        index, label, prediction: the image's number, its class, and the network's prediction (None where even that
            ran out of memory).
        status: ``verified``: proved on the whole region; ``falsified``: a counterexample was replayed;
            ``misclassified``: wrong (or tied) on the image itself; ``timeout``: its time was up; ``unknown``: no
            stage decided; ``error``: the verifier failed on it.
        stage: the stage that decided, or else the last that ran.
        lower_bound: best lower bound of the worst margin over the region; None where none was computed.
        seconds: the image's share of the time of its batches.
        arithmetic: arithmetic in which the verdict holds.
        reason: why the image is undecided, where a reason is known.
        counterexample: an image of the region on which the specification fails.
        spent: seconds by stage, for the stages that the image went through.
        search: counts and times of its searches, added up; None without one.
        peak_memory: largest resident memory in bytes of the process until the verdict was known; None where the system
            does not tell.
        proof: the file of its proof; no_proof: why a verified image has none. Both None where none were wanted.
    """

    index: int
    label: int | None
    prediction: int | None
    status: Status
    stage: str
    lower_bound: float | None
    seconds: float
    arithmetic: str
    reason: str | None = None
    counterexample: Tensor | None = None
    spent: Mapping[str, float] = field(default_factory=dict[str, float])
    search: SearchStatistics | None = None
    peak_memory: int | None = None
    proof: str | None = None
    no_proof: str | None = None

    def record(self) -> dict[str, Any]:
        """The verdict as a line of ``verdicts.jsonl``, without the counterexample."""
        left_out = {"counterexample", *(key for key in ("proof", "no_proof") if getattr(self, key) is None)}
        values = {key: value for key, value in vars(self).items() if key not in left_out}
        times = {"seconds": round(self.seconds, 6), "spent": rounded(self.spent)}
        return {**values, **times, **record_of_search(self.search)}
