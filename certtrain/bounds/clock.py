"""What time is left: looked at between the layers and chunks of whatever may take long.

Code that computes calls ``look`` before each piece of work that cannot be interrupted. Under no clock, as in training,
that does nothing. Under one (``until``) it raises ``OutOfTime`` where the time is up, or where the piece is expected to
end too late, by the pace of pieces of its kind so far. Whoever can keep what is known by then catches it.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import Portable

T = TypeVar("T")

LONG = 1e-3
"""Seconds: what takes less says little of how fast longer work goes, for most of it is overhead."""

LAG = 0.05
"""Seconds, and of work so many multiplications, after which a device that works on its own is waited for."""
LAG_WORK = 1e9


class OutOfTime(Portable, Exception):
    """The time is up, or what comes next would end too late."""


@dataclass
class Work:
    """Of one kind, so far: seconds and amount in all, and of the piece that was slowest for its size."""

    seconds: float = 0.0
    amount: float = 0.0
    slowest: tuple[float, float] = (0.0, 1.0)

    def add(self, seconds: float, amount: float) -> None:
        self.seconds, self.amount = self.seconds + seconds, self.amount + amount
        if seconds * self.slowest[1] > self.slowest[0] * amount:
            self.slowest = (seconds, amount)

    def expected(self, amount: float) -> float:
        """Seconds, by all pieces but the slowest one, which may have loaded code (1 to 2 s in a process' first call) or
        waited for the processor; 0 of a single piece, which says nothing then."""
        seconds, done = self.seconds - self.slowest[0], self.amount - self.slowest[1]
        return seconds / done * amount if done > 0 else 0.0


@dataclass
class Pace:
    """The work so far, by kind."""

    known: defaultdict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    pending: tuple[str, float, float] | None = None  # kind, amount, since when

    def begin(self, kind: str, work: float, now: float) -> None:
        self.pending = (kind, work, now)

    def end(self, now: float) -> None:
        """What began last is done."""
        if self.pending is not None:
            kind, work, since = self.pending
            if now - since >= LONG:
                self.known[kind].add(now - since, work)
            self.pending = None

    def expected(self, work: Mapping[str, float]) -> float:
        """Seconds; of kinds that are unknown, none."""
        return sum(self.known[kind].expected(amount) for kind, amount in work.items() if kind in self.known)


@dataclass
class Clock:
    """A deadline, on the clock ``now``.

    Args:
        own: whether it is earlier than that of the clock around it by its own will.
        wait: for a device that works on its own, so that time is what it took.
        late: whether ``look`` has raised.
    """

    deadline: float
    now: Callable[[], float]
    pace: Pace
    wait: Callable[[], object] | None
    outer: Clock | None
    own: bool
    late: bool = False
    waited: float = -math.inf
    unwaited: float = 0.0

    def look(self, kind: str, work: float, seconds: float) -> None:
        time = self.now()
        if self.wait is not None and (time - self.waited > LAG or self.unwaited > LAG_WORK):
            self.wait()
            self.waited, self.unwaited, time = self.now(), 0.0, self.now()
        self.pace.end(time)
        if time + max(seconds, self.pace.expected({kind: work})) >= self.deadline:
            self.stop()
        if work:
            self.pace.begin(kind, work, time)
            self.unwaited += work

    def stop(self) -> None:
        clock: Clock | None = self
        while clock is not None:
            clock.late = True
            clock = None if clock.own else clock.outer
        raise OutOfTime


_CLOCK: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def until(
    deadline: float = math.inf,
    *,
    keep: float = 0.0,
    now: Callable[[], float] | None = None,
    wait: Callable[[], object] | None = None,
) -> Generator[Clock]:
    """A clock for what is done inside, in this thread. The deadline of a clock around it holds too.

    Args:
        deadline: on the clock ``now``: that of the clock around it, by default ``time.perf_counter``.
        keep: seconds before the deadline of the clock around it that are left for what comes afterwards.
        wait: as in ``Clock``; by default that of the clock around it.
    """
    outer = _CLOCK.get()
    if outer is None:
        clock = Clock(deadline, now or time.perf_counter, Pace(), wait, None, True)
    else:
        outer.pace.pending = None
        most = outer.deadline - keep
        clock = Clock(
            min(deadline, most), now or outer.now, outer.pace, wait or outer.wait, outer, deadline < most,
        )  # fmt: skip
    token = _CLOCK.set(clock)
    try:
        yield clock
    finally:
        _CLOCK.reset(token)
        clock.pace.pending = None


def look(kind: str = "", work: float = 0.0, seconds: float = 0.0) -> None:
    """Before a piece of work that cannot be interrupted.

    Args:
        kind, work: how much of what is to come; at the next ``look``, or at ``done``, it is over.
        seconds: that it is expected to take, where the caller knows better.
    Raises:
        OutOfTime: it would not end in time.
    """
    clock = _CLOCK.get()
    if clock is not None:
        clock.look(kind, work, seconds)


def done() -> None:
    """The work that the last ``look`` announced is over."""
    clock = _CLOCK.get()
    if clock is not None and clock.pace.pending is not None:
        clock.pace.end(clock.now())


def looking(items: Iterable[T]) -> Iterator[T]:
    """Each of them after a ``look``."""
    for item in items:
        look()
        yield item


def now() -> float:
    clock = _CLOCK.get()
    return time.perf_counter() if clock is None else clock.now()


def left() -> float:
    """Seconds; inf under no clock."""
    clock = _CLOCK.get()
    return math.inf if clock is None or clock.deadline == math.inf else clock.deadline - clock.now()


def expected(work: Mapping[str, float]) -> float:
    """Seconds that so much work takes, as far as its kinds' pace is known; 0 under no clock."""
    clock = _CLOCK.get()
    return 0.0 if clock is None else clock.pace.expected(work)


def fitting(most: int, work: Mapping[str, float]) -> int:
    """How many of ``most`` pieces of so much work each to take at a time: all of them where these are expected to end
    in time, else as many as take half of it; one at least."""
    each = expected(work)
    if each == 0 or each * most <= (rest := left()):
        return most
    return max(1, min(most, int(0.5 * rest / each)))
