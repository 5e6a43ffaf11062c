"""Descents inside a search, from the points at which the bounds of its worst subproblems are smallest, and from random
points beside them.

A counterexample that descents from random points miss lies in a basin of its own. The search comes near to it: the
relaxation of the subproblem that holds it is the tighter, and its minimiser the closer, the deeper the subproblem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import key_of
from ..typed import as_ints
from .chords import Chords
from .descent import Points, Refute, descend, random_points
from .problem import Problem, rows_of_clauses

SHARE = 0.05
"""Descents' share of the evaluations of the network, forward and backward, that bounding subproblems costs."""

STEPS = 20
"""Steps of a descent."""

ROOT = 8
"""Descents of an image before the first split, which need not be earned."""

LEAST, MOST = 4, 16
"""Fewest and most descents of an image together."""

FIRST, LAST = 0.25, 0.01
"""Sizes of the first and the last step, in widths of the image's set."""


class _Start(NamedTuple):
    bound: float
    clause: int
    point: Tensor


class SearchDescents:
    """The points of each image's worst subproblems, and what of the search's work is due to descents from them.

    Work is counted in evaluations of the network, never in seconds: a search without a time limit repeats exactly.

    Args:
        share: share of the evaluations that bounding costs, besides the first ``ROOT`` descents of each image; 0 for
            no descents.
        at_a_time: most points that go through the network together.
    """

    def __init__(self, problem: Problem, chords: Chords, share: float, at_a_time: int):
        self.problem, self.chords, self.share, self.at_a_time = problem, chords, share, at_a_time
        self.members, _ = rows_of_clauses(problem.specification.clauses)
        self._due = [float(ROOT * STEPS if share else 0)] * len(problem)
        self._runs = 0
        self._kept: list[list[_Start]] = [[] for _ in range(len(problem))]
        self._met: list[set[tuple[int, float]]] = [set() for _ in range(len(problem))]

    def earn(self, image: Tensor, evaluations: int) -> None:
        """Count ``evaluations`` of the network for one subproblem of each image in ``image`` (P,)."""
        for number in as_ints(image):
            self._due[number] += self.share * evaluations

    def note(self, image: Tensor, clause: Tensor, bound: Tensor, points: Tensor, margin: Tensor) -> None:
        """Keep, for each image, the points (P, *shape) of the subproblems with the lowest bounds.

        Args:
            image, clause: (P,) the image of each point, and the clause that it is to violate.
            bound: (P,) its subproblem's bound; margin: (P,) its own, by which points are told from those met before.
        """
        if not self.share:
            return
        for place in as_ints(best_of_each(image, bound, MOST)):
            number, start = int(image[place]), _Start(float(bound[place]), int(clause[place]), points[place].clone())
            met = (start.clause, float(margin[place]))
            if met not in self._met[number]:
                self._met[number].add(met)
                self._kept[number] = sorted([*self._kept[number], start], key=lambda start: start.bound)[:MOST]

    def points(self, wanted: Callable[[int], bool]) -> Points | None:
        """As many points as are due for every wanted image with new points: these, then random ones for their clauses;
        None where fewer than ``LEAST`` are due for each."""
        chosen: list[tuple[int, int, _Start]] = []
        random: list[bool] = []
        for image, kept in enumerate(self._kept):
            count = min(MOST, int(self._due[image] / STEPS))
            if kept and count >= LEAST and wanted(image):
                self._due[image] -= STEPS * count
                chosen += [(image, stream, kept[stream % len(kept)]) for stream in range(count)]
                random += [stream >= len(kept) for stream in range(count)]
                self._kept[image] = []
        if not chosen:
            return None
        points = torch.stack([start.point for *_, start in chosen])
        images, clauses, streams = (
            torch.tensor(column, device=points.device)
            for column in zip(*((image, start.clause, stream) for image, stream, start in chosen), strict=True)
        )
        found = Points(images, clauses, points, streams)
        drawn = torch.tensor(random, device=points.device).nonzero().flatten()
        own = random_points(self.problem, found.take(drawn), key_of("search", self._runs))
        return replace(found, points=points.index_put((drawn,), own))

    def descend(self, points: Points, refute: Refute) -> None:
        """Descend from points.

        Raises:
            OutOfTime: the clock ran out.
        """
        self._runs += 1
        for part in torch.split(torch.arange(len(points), device=points.image.device), self.at_a_time):
            descend(
                self.problem, self.chords, self.members, points.take(part), refute,
                steps=STEPS, first=FIRST, last=LAST, key=key_of("search", self._runs),
            )  # fmt: skip


def best_of_each(image: Tensor, value: Tensor, most: int) -> Tensor:
    """The numbers of the ``most`` lowest values (P,) of each image (P,)."""
    order = torch.argsort(value, stable=True)
    order = order[torch.argsort(image[order], stable=True)]
    own = image[order]
    return order[torch.arange(len(order), device=order.device) - torch.searchsorted(own, own) < most]
