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
        root_steps: steps of the ascents that tighten the bounds of all neurons once, when the search has cost as much;
            0 for none.
        clip: whether these ascents' linear bounds clip neurons' bounds to where a subproblem may hold a counterexample.
        programs: most open neurons of a subproblem that is solved by a linear program before it is a leaf.
        most: number of splits after which an image is given up; None for no limit.
        descents: gradient steps towards counterexamples, as a share of the evaluations of the network that bounding
            subproblems costs, besides eight descents of each image before its first split; 0 for none.
    """

    batch: int = 256
    steps: int = 6
    rate: float = 0.1
    candidates: int = 1
    tighten: bool = False
    root_steps: int = 5
    clip: bool = True
    programs: int = 64
    most: int | None = None
    descents: float = 0.05

    def __post_init__(self) -> None:
        check(self.batch >= 1, "batch", self.batch, "a whole number >= 1")
        check(self.steps >= 0, "steps", self.steps, "a whole number >= 0")
        check(0 < self.rate < float("inf"), "rate", self.rate, "a number > 0")
        check(self.candidates >= 1, "candidates", self.candidates, "a whole number >= 1")
        check(self.root_steps >= 0, "root_steps", self.root_steps, "a whole number >= 0")
        check(self.programs >= 0, "programs", self.programs, "a whole number >= 0")
        check(0 <= self.descents <= 1, "descents", self.descents, "a share from 0 to 1")
        check(self.most is None or self.most >= 1, "most", self.most, "a whole number >= 1, or null")

    @classmethod
    def presets(cls) -> Mapping[str, Self]:
        return {name: cls(**changes) for name, changes in PRESETS.items()}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"steps": 3},
    "default": {},
    "thorough": {"steps": 12, "candidates": 3, "root_steps": 20},
}
"""The fields that each preset changes. ``fast`` bounds more subproblems a second, loosely, for instances that need few
splits; ``thorough`` bounds fewer of them, tightly, for instances whose tree grows too large."""
