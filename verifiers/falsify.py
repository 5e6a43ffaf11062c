"""Search for a counterexample by projected gradient descent, for any specification over any region."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from ..bounds.clock import OutOfTime, fitting, look, now, until
from ..bounds.effort import work_of
from ..bounds.network import Network
from ..errors import check
from ..noise import key_of
from ..typed import as_ints
from .bounds_so_far import BoundsSoFar
from .chords import Chords
from .descent import Points, Refute, descend, points_at_a_time, random_points, relaxed_minimisers
from .meeting import meet
from .problem import Problem, Status, rows_of_clauses
from .stage import Finding, Judge, Stage

SURE = 2
"""Number of starts that are no matter of luck: the middle of the region, and the minimiser of CROWN's bound."""

if TYPE_CHECKING:
    from .settings import Certify


@dataclass(frozen=True)
class FalsifyStage(Stage):
    """Falsifies by gradient-sign descent on the largest row of each open clause: from the middle of the region, from
    the minimiser of CROWN's bound where the activations' inputs are bounded already, and from random points; then, for
    clauses with equalities, by the search of ``meeting.py``.

    The starts of all open clauses of all images go through the network together, as far as memory and time allow; an
    image takes no further part once it is refuted. Random numbers depend on the image, the clause and the start alone.

    Args:
        steps: steps from each start; the first is a quarter of the hull's width, the last a hundredth of it.
        starts: starts for each clause.
        share: largest share of a problem's time, after which no further start is tried and no further step made.
        seconds: the same in seconds for a problem; None for no limit.
        seed: seed of the random starts.
        most: most points that go through the network together; fewer where memory or time is short.
    """

    name: ClassVar[str] = "falsify"
    steps: int = 40
    starts: int = 8
    share: float = 1.0
    seconds: float | None = None
    seed: int = 0
    most: int = 4096
    judge: Judge = field(default_factory=Judge)

    def __post_init__(self) -> None:
        check(self.steps >= 0, "steps", self.steps, "a whole number >= 0")
        check(self.starts >= 1, "starts", self.starts, "a whole number >= 1")
        check(0 <= self.share <= 1, "share", self.share, "0 to 1")
        check(self.seconds is None or self.seconds >= 0, "seconds", self.seconds, "seconds >= 0, or null")
        check(self.most >= 1, "most", self.most, "a whole number >= 1")

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        return cls(share=settings.falsifying_share)

    def within(self, seconds: float) -> tuple[Self, bool]:
        own = math.inf if self.seconds is None else self.seconds
        return replace(self, seconds=max(0.0, min(own, self.share * seconds))), False

    def prepared(self, seed: int, judge: Judge) -> Self:
        return replace(self, seed=seed, judge=judge)

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        counterexamples: list[Tensor | None] = [None] * len(problem)

        def refute(number: int, point: Tensor) -> bool:
            if counterexamples[number] is None and self.judge(problem, number, point):
                counterexamples[number] = point
            return counterexamples[number] is not None

        seconds = math.inf if self.seconds is None else self.seconds * len(problem)
        with until(now() + seconds):
            try:
                for starts in (range(min(SURE, self.starts)), range(SURE, self.starts)):
                    self._descend(problem, known, starts, counterexamples, refute)
                members, open_ = self._open(problem, known, counterexamples)
                most = min(self.most, points_at_a_time(known.network, problem.specification, known.rows))
                meet(problem, members, open_, refute, self.seed, most)
            except OutOfTime:
                pass
        statuses: list[Status | None] = [None if point is None else "falsified" for point in counterexamples]
        return Finding(statuses, known, counterexamples=counterexamples)

    @staticmethod
    def _open(problem: Problem, known: BoundsSoFar, found: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """(members, open): the rows (C, G) of each clause, and whether it is open (B, C), for images without a
        counterexample."""
        members, _ = rows_of_clauses(problem.specification.clauses)
        wanted = torch.tensor([point is None for point in found], dtype=torch.bool, device=known.rows.device)
        return members, ~(known.rows[:, members] > 0).any(-1) & wanted.unsqueeze(1)

    def _descend(
        self, problem: Problem, known: BoundsSoFar, starts: range, found: list[Tensor | None], refute: Refute
    ) -> None:
        """Descend from the starts of these numbers on each open clause of the images without a counterexample."""
        members, open_ = self._open(problem, known, found)
        chords = Chords.of(known.network, known.rows.dtype, known.bounds)
        device = known.rows.device
        image, clause = open_.nonzero(as_tuple=True)
        start = torch.tensor(starts, dtype=torch.int64, device=device).repeat_interleave(len(image))
        every = torch.arange(len(start), device=device)
        image, clause = image.repeat(len(starts)), clause.repeat(len(starts))
        most = min(self.most, points_at_a_time(known.network, problem.specification, known.rows))
        while len(every):
            look()
            part = every[: fitting(min(most, len(every)), _work_of_step(known.network))]
            every = every[len(part) :]
            part = part[torch.tensor([found[i] is None for i in as_ints(image[part])], device=device)]
            if len(part):
                points = self._starting(problem, known, members, image[part], clause[part], start[part])
                descend(
                    problem, chords, members, points, refute,
                    steps=self.steps, first=0.25, last=0.01, key=key_of(self.seed, "falsify"),
                )  # fmt: skip

    def _starting(
        self, problem: Problem, known: BoundsSoFar, members: Tensor, image: Tensor, clause: Tensor, start: Tensor
    ) -> Points:
        """The starts of the given numbers: 0 is the middle, 1 the minimiser of CROWN's bound, others are random."""
        some = Points(image, clause, problem.region.images[image], start)
        drawn = (start >= (SURE if known.bounds else 1)).nonzero().flatten()
        points = some.points.index_put((drawn,), random_points(problem, some.take(drawn), key_of(self.seed, "falsify")))
        relaxed = ((start == 1) & bool(known.bounds)).nonzero().flatten()
        if len(relaxed):
            points = points.index_put((relaxed,), relaxed_minimisers(problem, known, members, some.take(relaxed)))
        return replace(some, points=points)


def _work_of_step(network: Network) -> dict[str, float]:
    """Estimated work of one step at one point: one run of the network, and twice as much for the gradient."""
    last = len(network.operations) - 1
    return {kind: 3 * work for kind, work in work_of(network, last, lambda at: network.shapes[at].numel()).items()}
