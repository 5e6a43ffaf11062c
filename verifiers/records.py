"""Verdicts as lines of a file: validity, counts and comparison."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, get_args

from ..config import structure
from ..data import Split
from ..errors import InputError
from ..ledger import Line, Question, mistyped
from ..typed import as_ints
from .problem import UNDECIDED, Status
from .settings import Certify


class VerdictQuestion(Question):
    """The question whether each image of a split is safe on the whole set around it; the lines are verdicts.

    A decided image stays decided, whichever settings decided it; only verdicts on other weights are refused. An
    undecided image is asked about again where the settings now offer more.

    Args:
        rests_on: part of the basis; ``weights`` is the network's checksum.
    """

    split: Split
    rests_on: Mapping[str, Any]
    title = "certifying"
    fields: ClassVar[Mapping[str, type]] = {"status": str, "stage": str, "seconds": float, "spent": dict}

    @property
    def labels(self) -> list[int]:
        return as_ints(self.split.labels)

    def refuses_basis(self, basis: Line) -> str:
        if basis.get("weights") == self.rests_on["weights"]:
            return ""
        return "found a verdict on other weights; accepted: verdicts on this model.safetensors"

    def refuses_line(self, line: Line) -> str:
        known = get_args(Status)
        if (fault := mistyped(line, self.fields)) or line["status"] in known:
            return fault
        return f"found status {line['status']!r}; accepted: {', '.join(known)}"

    def may_improve(self, line: Line, basis: Line) -> bool:
        return undecided(line) and self.offers_more(line, basis)

    @abstractmethod
    def offers_more(self, record: Line, before: Line) -> bool:
        """Whether the settings offer an undecided image more than the basis ``before`` did."""

    def merge(self, line: Line, before: Line | None) -> Line:
        """The new verdict, with the better lower bound of the two."""
        bounds = [r.get("lower_bound") for r in (line, before) if r is not None]
        return {**line, "lower_bound": max((bound for bound in bounds if bound is not None), default=None)}

    def figures(self, lines: Sequence[Line]) -> str:
        return so_far(lines)

    def conclusion(self, lines: Sequence[Line]) -> str:
        return f"certified {len(lines)} images  {so_far(lines)}"


def undecided(record: Line) -> bool:
    return record["status"] in UNDECIDED


def worth_another_try(record: Line, settings: Certify, before: Line) -> bool:
    """Whether ``settings`` may decide an image that was left undecided: more time, more stages, or more memory.

    Args:
        before: the ``certify`` section that left it undecided.
    """
    try:
        had: Certify = structure(Certify, before)
    except InputError:  # settings of another version
        return True
    return (
        record.get("reason") == "out of memory"  # depends on the machine
        or (record["status"] == "timeout" and settings.timeout > had.timeout)
        or settings.has_more_stages(had)
    )


def summarise(records: Sequence[Line]) -> dict[str, float]:
    """Shares of all images in [0, 1]: clean >= attacked >= certified >= IBP-certified accuracy, image by image.

    ``attacked_accuracy`` counts images that are classified correctly and have no counterexample.
    """

    def share(holds: Callable[[Line], bool]) -> float:
        return sum(map(holds, records)) / len(records) if records else 0.0

    return {
        "clean_accuracy": share(lambda v: v["status"] != "misclassified"),
        "attacked_accuracy": share(lambda v: v["status"] not in ("misclassified", "falsified")),
        "certified_accuracy": share(lambda v: v["status"] == "verified"),
        "ibp_certified_accuracy": share(lambda v: v["status"] == "verified" and v["stage"] == "ibp"),
    }


def by_stage(records: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """For each stage, in order: the number of its images, its decisions by status, and its seconds."""
    stages: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda r: -len(r["spent"])):  # images that passed most stages give their order
        for stage, seconds in record["spent"].items():
            row = stages.setdefault(stage, {"images": 0, "seconds": 0.0})
            row["images"] += 1
            row["seconds"] += seconds
        if not undecided(record):
            row = stages[record["stage"]]
            row[record["status"]] = row.get(record["status"], 0) + 1
    return stages


def decided(records: Sequence[Line]) -> dict[str, dict[str, int]]:
    """Number of images that each stage decided, by status; stages without any are left out."""
    counts = {
        stage: {status: row[status] for status in get_args(Status) if status in row}
        for stage, row in by_stage(records).items()
    }
    return {stage: statuses for stage, statuses in counts.items() if statuses}


def reasons(records: Sequence[Line]) -> dict[str, int]:
    """Number of undecided images by reason, the most frequent reason first."""
    return dict(Counter(r.get("reason") or f"left open by {r['stage']}" for r in records if undecided(r)).most_common())


def so_far(records: Sequence[Line]) -> str:
    """One line of progress for a running sweep."""
    count = Counter("undecided" if undecided(record) else record["status"] for record in records)
    low, high = certified(records)
    words = (f"{status} {count[status]}" for status in ("verified", "falsified", "misclassified", "undecided"))
    return f"certified {100 * low:.1f} to {100 * high:.1f} %  {'  '.join(words)}"


def certified(records: Sequence[Line]) -> tuple[float, float]:
    """(lowest, highest) certified accuracy in [0, 1]: undecided images may still turn out verified."""
    low = sum(record["status"] == "verified" for record in records)
    count = max(1, len(records))
    return low / count, (low + sum(map(undecided, records))) / count
