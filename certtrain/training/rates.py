"""Schedules of the learning rate, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..config import added
from ..errors import check


@dataclass(frozen=True)
class Cycle:
    """Learning rate interpolated between given epochs: cyclic, one-cycle and warm-up schedules.

    ``{epochs: [0, 15, 30], shares: [0, 1, 0]}`` rises to ``optimiser.lr`` by the middle of 30 epochs and falls to 0.

    Args:
        epochs: rising from 0, whole or not; the last share applies from the last epoch on.
        shares: share of the optimiser's ``lr`` at each of ``epochs``.
        momentum: momentum at each of ``epochs``; empty for the optimiser's own. By default torch's cyclic schedules,
            and the recipes published with them, move it from 0.9 to 0.8 at the peak and back.
        curve: between two epochs ``linear``, or half a ``cosine``, flat at both ends: torch's one-cycle schedule.
    """

    epochs: tuple[float, ...]
    shares: tuple[float, ...]
    momentum: tuple[float, ...] = ()
    curve: Literal["linear", "cosine"] = added("linear")

    def __post_init__(self) -> None:
        rising = self.epochs[:1] == (0,) and all(low < high for low, high in pairwise(self.epochs))
        check(rising, "epochs", self.epochs, "a rising list that begins with 0")
        count = len(self.epochs)
        check(len(self.shares) == count, "shares", self.shares, f"as many numbers as epochs, {count}")
        check(all(share >= 0 for share in self.shares), "shares", self.shares, "numbers >= 0")
        check(len(self.momentum) in (0, count), "momentum", self.momentum, f"nothing, or {count} numbers")
        check(all(0 <= value < 1 for value in self.momentum), "momentum", self.momentum, "numbers in [0, 1)")
        check(self.curve in CURVES, "curve", self.curve, ", ".join(CURVES))

    def share(self, epoch: float) -> float:
        """The share of the learning rate after ``epoch`` epochs."""
        return interpolate(self.epochs, self.shares, epoch, CURVES[self.curve])

    def momentum_at(self, epoch: float) -> float | None:
        return interpolate(self.epochs, self.momentum, epoch, CURVES[self.curve]) if self.momentum else None


CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}
"""The share of the way from one value to the next, by the share of the time."""


def interpolate(
    places: tuple[float, ...], values: tuple[float, ...], place: float, curve: Callable[[float], float]
) -> float:
    """The value at ``place`` on the curves through (place, value); the last value beyond the last place."""
    for (low, start), (high, end) in pairwise(zip(places, values)):
        if place < high:
            return start + (end - start) * curve((place - low) / (high - low))
    return values[-1]
