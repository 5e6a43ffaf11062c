"""Receptive fields: the part of an image that a later entry of the network depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Pair = tuple[int, int]
"""(rows, columns)."""


def pair(values: Iterable[int]) -> Pair:
    """Exactly two values as a tuple."""
    first, second = values
    return first, second


@dataclass(frozen=True)
class Window:
    """The receptive field, in one operation's output (C, H, W), of an entry at place p of a later operation.

    It starts at p · jump + start and has ``size`` rows and columns.
    """

    jump: Pair = (1, 1)
    start: Pair = (0, 0)
    size: Pair = (1, 1)

    def joined(self, other: Window) -> Window:
        """The smallest window that contains both; of equal jumps."""
        start = pair(map(min, self.start, other.start))
        ends = zip(start, self.start, self.size, other.start, other.size, strict=True)
        return Window(self.jump, start, pair(max(a + n, b + m) - first for first, a, n, b, m in ends))
