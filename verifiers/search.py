"""Recipe settings of branch and bound."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import check


@dataclass(frozen=True)
class Search:
    """Settings of branch and bound on neurons.

    Args:
        batch: subproblems split in one round, over all images.
        steps, rate: steps and learning rate of the ascent on slopes and multipliers that bounds a subproblem.
        candidates: neurons whose halves are bounded before each split, to choose the best.
        tighten: whether each split recomputes the bounds of all later neurons.
        most: number of splits after which an image is given up; None for no limit.
        descents: gradient steps towards counterexamples, as a share of the evaluations of the network that bounding
            subproblems costs; 0 for none.
    """

    batch: int = 256
    steps: int = 8
    rate: float = 0.1
    candidates: int = 1
    tighten: bool = True
    most: int | None = None
    descents: float = 0.1

    def __post_init__(self) -> None:
        check(self.batch >= 1, "batch", self.batch, "a whole number >= 1")
        check(self.steps >= 0, "steps", self.steps, "a whole number >= 0")
        check(0 < self.rate < float("inf"), "rate", self.rate, "a number > 0")
        check(self.candidates >= 1, "candidates", self.candidates, "a whole number >= 1")
        check(0 <= self.descents <= 1, "descents", self.descents, "a share from 0 to 1")
        check(self.most is None or self.most >= 1, "most", self.most, "a whole number >= 1, or null")
