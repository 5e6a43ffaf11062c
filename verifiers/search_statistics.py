"""Counts and times of a search, which each verdict records.

Time is measured by parts: ``part`` names the part that its block belongs to, and ``measured`` collects the seconds of
all parts inside its block. An inner part's time does not count for the outer one. On a GPU, which works on its own, a
part may be charged for work that another has started.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["bounding", "rebounding", "programs", "branching", "attack"]
"""Parts of a search: linear bounds of subproblems, new bounds of their neurons, linear programs, the choice of what to
split at (with the children bounded for it), and candidates for counterexamples with their replay."""


@dataclass(frozen=True)
class SearchStatistics:
    """Counts and times of the search for one image.

    Args:
        rounds: rounds in which subproblems of the image were split.
        splits: subproblems that were split; children: subproblems made by that, of which the last may not be bounded.
        closed: subproblems closed by a proof, the root or roots among them.
        seconds: the image's share of the seconds of each part.
    """

    rounds: int = 0
    splits: int = 0
    children: int = 0
    closed: int = 0
    seconds: Mapping[Part, float] = field(default_factory=dict[Part, float])

    def __add__(self, other: SearchStatistics) -> SearchStatistics:
        return SearchStatistics(
            self.rounds + other.rounds, self.splits + other.splits, self.children + other.children,
            self.closed + other.closed, _sum(self.seconds, other.seconds),
        )  # fmt: skip

    def record(self) -> dict[str, int]:
        """The counts."""
        return {name: count for name, count in vars(self).items() if name != "seconds"}


def record_of_search(statistics: SearchStatistics | None) -> dict[str, Any]:
    """The entries ``search`` (counts; null without a search) and ``search_seconds`` (by part) of a line of answers."""
    if statistics is None:
        return {"search": None, "search_seconds": {}}
    return {"search": statistics.record(), "search_seconds": rounded(statistics.seconds)}


def rounded(seconds: Mapping[Any, float]) -> dict[str, float]:
    """Seconds to the microsecond."""
    return {name: round(value, 6) for name, value in seconds.items()}


class _Meter:
    """Seconds by part so far, and the part in progress."""

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = {}
        self.part: Part | None = None
        self.since = 0.0

    def switch(self, part: Part | None) -> Part | None:
        """Begin ``part``, and return the one that was in progress. (``clock.now`` may be a test's, which ticks.)"""
        now, before = time.perf_counter(), self.part
        if before is not None:
            self.seconds[before] = self.seconds.get(before, 0.0) + now - self.since
        self.part, self.since = part, now
        return before


_METER: ContextVar[_Meter | None] = ContextVar("meter", default=None)


@contextmanager
def part(name: Part) -> Generator[None]:
    """Count the block's time as ``name`` if it is measured; otherwise do nothing."""
    meter = _METER.get()
    if meter is None:
        yield
        return
    outer = meter.switch(name)
    try:
        yield
    finally:
        meter.switch(outer)


@contextmanager
def measured(name: Part) -> Generator[dict[Part, float]]:
    """Count the block's time as ``name`` where no inner part is named. Yields the seconds by part, complete when the
    block ends."""
    outer = _METER.get()
    meter = outer or _Meter()
    token, around, before = _METER.set(meter), meter.switch(name), dict(meter.seconds)
    spent: dict[Part, float] = {}
    try:
        yield spent
    finally:
        meter.switch(around)
        _METER.reset(token)
        spent |= {part: seconds - before.get(part, 0.0) for part, seconds in meter.seconds.items()
                  if seconds > before.get(part, 0.0)}  # fmt: skip


_GATHERED: ContextVar[list[SearchStatistics] | None] = ContextVar("gathered", default=None)


@contextmanager
def gathered() -> Generator[list[SearchStatistics]]:
    """Gather the statistics of all searches in the block, however they end: by a result, or by an exception."""
    found: list[SearchStatistics] = []
    token = _GATHERED.set(found)
    try:
        yield found
    finally:
        _GATHERED.reset(token)


def note(statistics: list[SearchStatistics]) -> None:
    """Hand the statistics of a search that has ended to ``gathered``."""
    found = _GATHERED.get()
    if found is not None:
        found += statistics


def _sum(one: Mapping[Part, float], other: Mapping[Part, float]) -> dict[Part, float]:
    total = dict(one)
    for name, seconds in other.items():
        total[name] = total.get(name, 0.0) + seconds
    return total
