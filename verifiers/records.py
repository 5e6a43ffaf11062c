"""Verdicts as they stand in a file, one a line: reading, counting, comparing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from ..config import structure
from ..errors import InputError
from ..run_folder import JsonLines
from .problem import UNDECIDED, Status
from .settings import Certify

Record = Mapping[str, Any]
FIELDS = {"index": int, "label": int, "status": str, "stage": str, "seconds": float, "spent": dict, "settings": str}


def read_verdicts(file: JsonLines, labels: Sequence[int], settings: Mapping[str, Record], weights: str):
    """``{index: record}``; the last of several lines on one image counts.

    Args:
        labels: of the images that were asked about, by number.
        settings: what verdicts can rest on, by name.
        weights: of the network, their checksum.
    Raises:
        InputError: a line that is none of ours, or on other images or another network.
    """
    known: dict[int, Record] = {}
    for number, record in enumerate(file, start=1):
        where = f"{file.path}, line {number}"
        for field, kind in FIELDS.items():
            value = record.get(field) if isinstance(record, dict) else None
            if not isinstance(value, kind):
                raise InputError(f"{where}: found {field} {value!r}; accepted: the file as written")
        index, status, name = record["index"], record["status"], record["settings"]
        if not 0 <= index < len(labels):
            raise InputError(f"{where}: found index {index}; accepted: 0 to {len(labels) - 1}, the images of the data")
        if record["label"] != labels[index] or status not in get_args(Status):
            found = f"label {record['label']}, status {status!r}"
            raise InputError(f"{where}: found {found}; accepted: label {labels[index]}, {', '.join(get_args(Status))}")
        if name not in settings:
            raise InputError(f"{where}: found settings {name!r}; accepted: what verdicts/settings.jsonl describes")
        if settings[name].get("weights") != weights:
            raise InputError(f"{where}: found a verdict on other weights; accepted: verdicts on this model.safetensors")
        known[index] = record
    return known


def undecided(record: Record) -> bool:
    return record["status"] in UNDECIDED


def worth_another_try(record: Record, settings: Certify, before: Record) -> bool:
    """Whether ``settings`` offer an undecided image something that it has not had.

    Args:
        before: the ``certify`` section that left it undecided.
    """
    try:
        had: Certify = structure(Certify, before)
    except InputError:  # of another version
        return True
    return (
        record.get("reason") == "out of memory"  # of whichever machine it was
        or (record["status"] == "timeout" and settings.timeout > had.timeout)
        or settings.has_more_stages(had)
    )


def best_of(record: Record, before: Record | None) -> Record:
    """``record`` with the better lower bound of two verdicts on one image."""
    bounds = [r.get("lower_bound") for r in (record, before) if r is not None]
    return {**record, "lower_bound": max((bound for bound in bounds if bound is not None), default=None)}


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """Shares of all images: clean >= attacked >= certified >= IBP-certified, image by image.

    ``attacked_accuracy``: right, and no stage found a counterexample.
    """

    def share(holds: Callable[[Record], bool]) -> float:
        return sum(map(holds, records)) / len(records) if records else 0.0

    return {
        "clean_accuracy": share(lambda v: v["status"] != "misclassified"),
        "attacked_accuracy": share(lambda v: v["status"] not in ("misclassified", "falsified")),
        "certified_accuracy": share(lambda v: v["status"] == "verified"),
        "ibp_certified_accuracy": share(lambda v: v["status"] == "verified" and v["stage"] == "ibp"),
    }


def by_stage(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Of each stage, in their order: the images that it looked at, its decisions by status, its seconds."""
    stages: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda r: -len(r["spent"])):  # those that went furthest name the order
        for stage, seconds in record["spent"].items():
            row = stages.setdefault(stage, {"images": 0, "seconds": 0.0})
            row["images"] += 1
            row["seconds"] += seconds
        if not undecided(record):
            row = stages[record["stage"]]
            row[record["status"]] = row.get(record["status"], 0) + 1
    return stages


def decided(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """How many images each stage decided, by status."""
    counts = {
        stage: {status: row[status] for status in get_args(Status) if status in row}
        for stage, row in by_stage(records).items()
    }
    return {stage: found for stage, found in counts.items() if found}


def reasons(records: Sequence[Record]) -> dict[str, int]:
    """How many images are undecided, and why; the most frequent reason first."""
    return dict(Counter(r.get("reason") or f"left open by {r['stage']}" for r in records if undecided(r)).most_common())


def so_far(records: Sequence[Record]) -> str:
    """One line on a sweep that is under way."""
    count = Counter("undecided" if undecided(record) else record["status"] for record in records)
    low, high = certified(records)
    words = (f"{status} {count[status]}" for status in ("verified", "falsified", "misclassified", "undecided"))
    return f"certified {100 * low:.1f} to {100 * high:.1f} %  {'  '.join(words)}"


def certified(records: Sequence[Record]) -> tuple[float, float]:
    """What certified accuracy is at least, and at most: undecided images may still turn out verified."""
    low = sum(record["status"] == "verified" for record in records)
    return tuple((low + more) / max(1, len(records)) for more in (0, sum(map(undecided, records))))  # type: ignore[return-value]
