"""Deadlines for long computations, checked between layers and chunks.

Call ``look`` before each piece of work that cannot be interrupted. Without a clock, as in training, it does nothing.
Under a clock (``until``) it raises ``OutOfTime`` if the deadline has passed, or if the piece is expected to end after
it, judged by the pace of earlier pieces of the same kind. A caller that can keep partial results catches it.
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
"""Seconds; shorter pieces are not counted in the pace, since most of their time is overhead."""

LAG = 0.05
"""Seconds after which ``look`` waits for an asynchronous device."""
LAG_WORK = 1e9
"""Multiplications started since the last wait after which ``look`` waits for an asynchronous device."""


class OutOfTime(Portable, Exception):
    """The deadline has passed, or the next piece of work is expected to end after it."""


@dataclass
class Work:
    """Work of one kind so far: total seconds and amount, and (seconds, amount) of the piece with the lowest pace."""

    seconds: float = 0.0
    amount: float = 0.0
    slowest: tuple[float, float] = (0.0, 1.0)

    def add(self, seconds: float, amount: float) -> None:
        self.seconds, self.amount = self.seconds + seconds, self.amount + amount
        if seconds * self.slowest[1] > self.slowest[0] * amount:
            self.slowest = (seconds, amount)

    def expected(self, amount: float) -> float:
        """Expected seconds for ``amount`` of work, from all pieces but the slowest; 0 after a single piece.

        The slowest piece may have loaded code (1 to 2 s in a process' first call) or waited for the processor.
        """
        seconds, completed = self.seconds - self.slowest[0], self.amount - self.slowest[1]
        return seconds / completed * amount if completed > 0 else 0.0


@dataclass
class Pace:
    """Completed work by kind, and the piece in progress."""

    known: defaultdict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    pending: tuple[str, float, float] | None = None  # kind, amount, start time

    def begin(self, kind: str, work: float, now: float) -> None:
        self.pending = (kind, work, now)

    def end(self, now: float) -> None:
        """Count the piece in progress as completed."""
        if self.pending is not None:
            kind, work, since = self.pending
            if now - since >= LONG:
                self.known[kind].add(now - since, work)
            self.pending = None

    def expected(self, work: Mapping[str, float]) -> float:
        """Expected seconds for amounts of work by kind; kinds without a known pace count 0."""
        return sum(self.known[kind].expected(amount) for kind, amount in work.items() if kind in self.known)


@dataclass
class Clock:
    """A deadline, in seconds on the clock ``now``.

    Args:
        wait: synchronises an asynchronous device, so that measured times include its work.
        own: whether the deadline was requested, and not inherited from the outer clock.
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
    """Context manager that sets a deadline in this thread. An outer deadline holds as well.

    Args:
        deadline: seconds on the clock ``now``.
        keep: seconds to leave before the outer deadline for later work.
        now: the clock; by default the outer one's, or ``time.perf_counter``.
        wait: as in ``Clock``; by default the outer one's.
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
    """Announce a piece of work that cannot be interrupted; it ends at the next ``look`` or ``done``.

    Args:
        kind, work: its kind, and its amount in multiplications.
        seconds: a lower bound of its expected duration, where the caller knows one.
    Raises:
        OutOfTime: the deadline has passed, or the piece is expected to end after it.
    """
    clock = _CLOCK.get()
    if clock is not None:
        clock.look(kind, work, seconds)


def done() -> None:
    """End the piece of work that the last ``look`` announced."""
    clock = _CLOCK.get()
    if clock is not None and clock.pace.pending is not None:
        clock.pace.end(clock.now())


def looking(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, with a ``look`` before each."""
    for item in items:
        look()
        yield item


def now() -> float:
    """Seconds on the current clock; ``time.perf_counter`` without one."""
    clock = _CLOCK.get()
    return time.perf_counter() if clock is None else clock.now()


def left() -> float:
    """Seconds until the deadline; inf without a clock."""
    clock = _CLOCK.get()
    return math.inf if clock is None or clock.deadline == math.inf else clock.deadline - clock.now()


def expected(work: Mapping[str, float]) -> float:
    """Expected seconds for amounts of work by kind; kinds without a known pace count 0; 0 without a clock."""
    clock = _CLOCK.get()
    return 0.0 if clock is None else clock.pace.expected(work)


def fitting(most: int, work: Mapping[str, float]) -> int:
    """Number of pieces, of ``work`` each, to compute at a time: ``most`` if they are expected to end in time, else as
    many as fit into half of the time left; at least 1."""
    seconds = expected(work)
    if seconds == 0 or seconds * most <= (rest := left()):
        return most
    return max(1, min(most, int(0.5 * rest / seconds)))
