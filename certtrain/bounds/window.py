"""The part of an image that an entry further on in the network depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Pair = tuple[int, int]
"""Rows and columns."""


def pair(values: Iterable[int]) -> Pair:
    first, second = values
    return first, second


@dataclass(frozen=True)
class Window:
    """The places of one operation's output (C, H, W) that the entry at p sees: from p · jump + start on, ``size``."""

    jump: Pair = (1, 1)
    start: Pair = (0, 0)
    size: Pair = (1, 1)

    def joined(self, other: Window) -> Window:
        """The smallest window that holds both."""
        start = pair(map(min, self.start, other.start))
        ends = zip(start, self.start, self.size, other.start, other.size, strict=True)
        return Window(self.jump, start, pair(max(a + n, b + m) - first for first, a, n, b, m in ends))
