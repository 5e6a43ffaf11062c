"""Recipe settings of branch and bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..components import Presets
from ..errors import check


@dataclass(frozen=True)
class Search(Presets):
    """Settings of branch and bound on neurons. ``PRESETS`` has names for some: ``Search.preset("thorough")``.

    Args:
        batch: subproblems split in one round, over all images.
        steps, rate: steps and learning rate of the ascent on slopes and multipliers that bounds a subproblem.
        candidates: neurons whose halves are bounded before each split, to choose the best.
        tighten: whether each split recomputes the bounds of all later neurons.
        most: number of splits after which an image is given up; None for no limit.
    """

    batch: int = 256
    steps: int = 8
    rate: float = 0.1
    candidates: int = 1
    tighten: bool = True
    most: int | None = None

    def __post_init__(self) -> None:
        check(self.batch >= 1, "batch", self.batch, "a whole number >= 1")
        check(self.steps >= 0, "steps", self.steps, "a whole number >= 0")
        check(0 < self.rate < float("inf"), "rate", self.rate, "a number > 0")
        check(self.candidates >= 1, "candidates", self.candidates, "a whole number >= 1")
        check(self.most is None or self.most >= 1, "most", self.most, "a whole number >= 1, or null")

    @classmethod
    def presets(cls) -> Mapping[str, Self]:
        return {name: cls(**changes) for name, changes in PRESETS.items()}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"steps": 4, "tighten": False},
    "default": {},
    "thorough": {"steps": 16, "candidates": 6, "tighten": True},
}
"""The fields that each preset changes. ``fast`` bounds many subproblems a second, loosely, for instances that need few
splits; ``thorough`` bounds few of them, tightly, for instances whose tree grows too large."""
