"""Schedules of epsilon, batch by batch. A fraction of 0 means that the batch is trained clean."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from ..config import Component
from ..errors import check


@dataclass(frozen=True)
class EpsilonSchedule(Component):
    """A ramp over whole epochs, evaluated for every batch.

    Args:
        start: the epoch (from 1) whose first batch is the last clean one.
        length: length of the ramp in epochs; 0 for full epsilon from the start.
    """

    start: int = 1
    length: int = 20

    def __post_init__(self) -> None:
        check(self.start >= 1, "start", self.start, "an epoch >= 1")
        check(self.length >= 0, "length", self.length, "a whole number of epochs >= 0")

    @property
    def end(self) -> int:
        """The number of epochs at the end of the ramp."""
        return self.start - 1 + self.length

    def steps(self, steps_per_epoch: int) -> tuple[int, int]:
        """(first, last) step of the ramp, 0-based: epsilon is 0 up to the first and full from the last on."""
        first = (self.start - 1) * steps_per_epoch
        return first, first + self.length * steps_per_epoch

    def done(self, step: int, steps_per_epoch: int) -> float:
        """Share of the ramp that is done at ``step``, in [0, 1]."""
        first, last = self.steps(steps_per_epoch)
        return 1.0 if step >= last else max(0, step - first) / (last - first)

    @abstractmethod
    def fraction(self, step: int, steps_per_epoch: int) -> float:
        """epsilon / epsilon_max at a 0-based step: 0 before the ramp, 1 after it, never falling."""


@dataclass(frozen=True)
class Linear(EpsilonSchedule):
    """A linear ramp from 0 to 1."""

    def fraction(self, step: int, steps_per_epoch: int) -> float:
        return self.done(step, steps_per_epoch)


@dataclass(frozen=True)
class Smoothed(EpsilonSchedule):
    """A power over the first part of the ramp, then linear; value and slope are continuous (arXiv 2002.12920).

    With the published exponent 4 and middle 0.25, a share p of the ramp gives 256 p^4 / 13 up to p = 1/4 and
    (16 p - 3) / 13 after it.

    Args:
        exponent: exponent of the power.
        middle: share of the ramp after which it is linear.
    """

    exponent: float = 4.0
    middle: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.exponent >= 1, "exponent", self.exponent, "a number >= 1")
        check(0 <= self.middle < 1, "middle", self.middle, "a share in [0, 1)")

    def fraction(self, step: int, steps_per_epoch: int) -> float:
        first, last = self.steps(steps_per_epoch)
        if step >= last:
            return 1.0
        bend = int(self.middle * (last - first))
        if step <= first:
            return 0.0
        whole = bend + self.exponent * (last - first - bend)  # in units in which the power reaches ``bend``
        behind = step - first
        if behind < bend:
            return bend * (behind / bend) ** self.exponent / whole
        return (bend + self.exponent * (behind - bend)) / whole
