"""What is asked of a verifier, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds import Region
from ..errors import InputError
from ..labels import as_labels, check_labels, classes_in

Status = Literal["verified", "falsified", "misclassified", "unknown", "timeout", "error"]

UNDECIDED: tuple[Status, ...] = ("unknown", "timeout", "error")


@dataclass(frozen=True)
class Specification:
    """Linear output specifications of a batch of images, in disjunctive normal form of the *unsafe* set.

    A point is unsafe if in some clause every row holds: <row, logits> + offset <= 0. Ties are unsafe.

    Args:
        rows: (B, R, K); offsets: (B, R).
        clauses: (R,) int64, the clause of each row, numbered from 0.
        labels: (B,) the class that is protected, where the specification says that it wins.
    Raises:
        InputError: no rows, of which every statement would hold; shapes that do not fit.
    """

    rows: Tensor
    offsets: Tensor
    clauses: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.rows.shape)
        if len(shape) != 3 or not shape[1] or self.offsets.shape != shape[:2] or self.clauses.shape != shape[1:2]:
            found = f"rows {shape}, offsets {tuple(self.offsets.shape)}, clauses {tuple(self.clauses.shape)}"
            raise InputError(f"specification: found {found}; accepted: (B, R, K), (B, R) and (R,), one row or more")

    @classmethod
    def robust(cls, labels: Tensor, classes: int) -> Specification:
        """Class ``labels`` wins against every other: K - 1 clauses of one row e_y - e_j, j != y increasing.

        Raises:
            InputError: fewer than two classes; labels that are none of them.
        """
        labels = as_labels(labels)
        classes_in((len(labels), classes))
        check_labels(labels, classes)
        identity = torch.eye(classes, device=labels.device)
        margins = identity[labels][:, None] - identity
        others = ~F.one_hot(labels, classes).bool()
        rows = margins[others].reshape(len(labels), classes - 1, classes)
        clauses = torch.arange(classes - 1, device=labels.device)
        return cls(rows, torch.zeros(rows.shape[:2], device=labels.device), clauses, labels)

    def values(self, logits: Tensor) -> Tensor:
        """(B, R) values of the rows at logits (B, K)."""
        return (self.rows.to(logits.dtype) @ logits.unsqueeze(-1)).squeeze(-1) + self.offsets

    def worst(self, values: Tensor) -> Tensor:
        """(B,) > 0 where the specification holds, given row values, or proved where they are lower bounds.

        The minimum over clauses of the maximum within each: a clause is refuted by any one of its rows.
        """
        best = values.new_full((len(values), int(self.clauses.max()) + 1), -torch.inf)
        return best.scatter_reduce(1, self.clauses.expand(len(values), -1), values, "amax").amin(1)

    def subset(self, index: Tensor) -> Specification:
        labels = None if self.labels is None else self.labels[index]
        return Specification(self.rows[index], self.offsets[index], self.clauses, labels)


def rows_of_clauses(clauses: Tensor) -> tuple[Tensor, int]:
    """(C, R): the rows of each of C clauses, short ones filled up with their first row again; and C."""
    count = int(clauses.max()) + 1 if len(clauses) else 0
    members = [(clauses == clause).nonzero().flatten() for clause in range(count)]
    most = max((len(m) for m in members), default=1)
    rows = [torch.cat([m, m[:1].expand(most - len(m))]) for m in members]
    return (torch.stack(rows) if rows else clauses.reshape(0, 1)), count


@dataclass(frozen=True)
class Problem:
    """Does the specification hold on the whole region around each image? A batch of such questions.

    Args:
        network: in evaluation mode, float32 or float64; maps (B, *shape) to (B, K) logits.
        region: a perturbation set around B images.
        specification: B specifications.
        index: (B,) int64, each image's number; it keys the attacks' random numbers.
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
        index, label, prediction: the image's number, its class, and the network's choice on it (None where even that
            ran out of memory).
        status: ``verified``: proved on the whole region; ``falsified``: a counterexample was replayed;
            ``misclassified``: wrong (or tied) on the image itself; ``timeout``: its time was up; ``unknown``: no
            stage decided.
        stage: the stage that decided, or the last that tried.
        lower_bound: of the worst margin over the region, the best found; None where none was computed.
        seconds: the image's share of the time of the batches that it was in.
        arithmetic: in which the verdict holds.
        reason: why it is undecided, where there is something to say.
        counterexample: an image of the region on which the specification fails.
        spent: the seconds, stage by stage: those that it went through.
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

    def record(self) -> dict[str, Any]:
        """The verdict's line in ``verdicts.jsonl``."""
        values = {key: value for key, value in vars(self).items() if key != "counterexample"}
        spent = {stage: round(seconds, 6) for stage, seconds in self.spent.items()}
        return {**values, "seconds": round(self.seconds, 6), "spent": spent}
