"""How branch and bound goes about it, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import check

TOLERANCE = 1e-6
"""Of the logits' scale: a leaf whose exact minimum is closer to 0 is left undecided."""

EMPTY = 1e-5
"""A neuron whose bounds cross by more, relative to 1 + |bound|, contradicts the assumed signs; less may be rounding."""

PROGRAM_EVERY = 8
"""Splits after which a subproblem goes to a linear program, whose multipliers are the best ones: many subproblems that
no point satisfies are found there (18 open neurons over 3 inputs: 2 s, not minutes). With 6, hidden counterexamples of
networks of 30 neurons took four times as long."""

PROBING = 0.25
"""Of the time goes into linear programs of open subproblems. Without them networks of 30 neurons with a counterexample
that is hidden from gradients take minutes."""


@dataclass(frozen=True)
class Search:
    """How to search.

    Args:
        batch: subproblems that are split in one round, over all images.
        steps, rate: of the ascent on slopes and multipliers that bounds a subproblem.
        candidates: neurons that are looked ahead for each split.
        tighten: whether a split bounds all later neurons anew.
        most: splits of one image at which it is given up; None for no limit.
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


@dataclass(frozen=True)
class Outcome:
    """Of B images: whether all their clauses are proved; a counterexample or None; the bound of the worst margin (B,);
    seconds (B,); and why an image was given up, where it was."""

    proved: Tensor
    counterexamples: list[Tensor | None]
    lower: Tensor
    seconds: Tensor
    reasons: list[str | None]
