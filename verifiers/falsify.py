"""Search for a counterexample by projected gradient descent, for any specification over any region."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..bounds import forward, memory
from ..bounds.clock import OutOfTime, fitting, look, looking, now, until
from ..bounds.effort import work_of
from ..bounds.network import Network
from ..noise import Noise, key_of
from ..typed import as_ints
from .bounds_so_far import BoundsSoFar
from .problem import Problem, Specification, Status, rows_of_clauses
from .stage import Finding, Judge, Stage, holds


@dataclass(frozen=True)
class FalsifyStage(Stage):
    """Falsifies by gradient-sign descent on the largest row of each open clause, from the middle of the region and from
    random points.

    Args:
        steps: steps from each start; the first is a quarter of the hull's width, the last a hundredth of it.
        starts: starts for each clause.
        seconds: time after which no further start is tried and no further step made.
        seed: seed of the random starts.
        most: most points that go through the network together; fewer where that would take too long.
    """

    name: ClassVar[str] = "falsify"
    steps: int = 40
    starts: int = 8
    seconds: float = math.inf
    seed: int = 0
    most: int = 4096
    judge: Judge = field(default_factory=Judge)

    def prepared(self, seed: int, judge: Judge) -> Self:
        return replace(self, seed=seed, judge=judge)

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        counterexamples: list[Tensor | None] = [None] * len(problem)
        members, _ = rows_of_clauses(problem.specification.clauses)
        number, clause = (~(known.rows[:, members] > 0).any(-1)).nonzero(as_tuple=True)
        with until(now() + self.seconds):
            most = min(self.most, _points_at_a_time(known.network, problem.region.images))
            most = fitting(max(1, min(most, len(number))), _step_of(known.network))
            work = [part for start in range(self.starts) for part in _parts(number, clause, start, most)]
            try:
                for number, clause, start in looking(work):
                    wanted = torch.tensor([counterexamples[i] is None for i in as_ints(number)], device=number.device)
                    if wanted.any():
                        for place, point in self._candidates(problem, number[wanted], clause[wanted], start):
                            if counterexamples[place] is None and self.judge(problem, place, point):
                                counterexamples[place] = point
            except OutOfTime:
                pass
        statuses: list[Status | None] = [None if point is None else "falsified" for point in counterexamples]
        return Finding(statuses, known, counterexamples=counterexamples)

    def _candidates(self, problem: Problem, number: Tensor, clause: Tensor, start: int) -> list[tuple[int, Tensor]]:
        """(problem's number, point) for points on which the network, run in a batch, violates the specification."""
        region, specification = problem.region.take(number), problem.specification.subset(number)
        hull, width = region.hull, 2 * region.hull.radius
        points = region.images
        if start:
            noise = Noise(key_of(self.seed, "falsify", start), problem.index[number] * (1 << 20) + clause)
            points = region.nearest(hull.lower + noise.uniform(points.shape[1:], dtype=points.dtype) * width)
        candidates: list[tuple[int, Tensor]] = []
        for step in range(self.steps + 1):
            with torch.enable_grad():
                at = points.detach().requires_grad_()
                logits = forward(problem.network, at).logits
                goal = _largest_row(specification, logits, clause).sum()
            wrong = ~holds(specification, logits.detach())
            candidates += [(int(number[i]), points[i]) for i in as_ints(wrong.nonzero())]
            if candidates or step == self.steps:
                break
            look()
            (gradient,) = torch.autograd.grad(goal, at)
            size = 0.25 * 0.04 ** (step / self.steps)
            points = region.nearest(points - size * width * gradient.sign())
        return candidates


def _points_at_a_time(network: Network, like: Tensor) -> int:
    """Number of points whose gradients fit into one round's memory; at least 1."""
    numbers = 4 * sum(shape.numel() for shape in network.shapes)
    return max(1, memory.planned(like) // max(1, numbers * like.element_size()))


def _step_of(network: Network) -> dict[str, float]:
    """Estimated work of one step at one point: one run of the network, and twice as much for the gradient."""
    last = len(network.operations) - 1
    return {kind: 3 * work for kind, work in work_of(network, last, lambda at: network.shapes[at].numel()).items()}


def _parts(number: Tensor, clause: Tensor, start: int, most: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    for numbers, clauses in zip(torch.split(number, most), torch.split(clause, most), strict=True):
        yield numbers, clauses, start


def _largest_row(specification: Specification, logits: Tensor, clause: Tensor) -> Tensor:
    """(P,) the largest row of each point's own clause; where <= 0 the point is a counterexample."""
    values = specification.values(logits)
    return values.masked_fill(specification.clauses != clause.unsqueeze(1), -torch.inf).amax(1)
