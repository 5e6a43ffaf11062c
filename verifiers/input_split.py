"""Branch and bound on the input box: for networks of few inputs, as in control, far fewer pieces than ReLU signs make.

Each round halves the worst-bounded boxes of every image and bounds the halves by CROWN. Where a box is cut follows
from its linear bound: the input through which that bound varies most over the box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import Box
from ..bounds.clock import OutOfTime, look, now, until
from ..bounds.crown import rows_at_a_time
from .box_bounds import BoxBounds
from .frontier import Frontier
from .known import Known
from .problem import Problem
from .search import Outcome
from .tree import in_turns, rows_of

INPUTS = 20
"""With more inputs that vary, halves of a box are hardly easier than the box. 14 of them, before 64 ReLUs (the GCAS
properties of VNN-COMP 2022): 0.4 s by halves, not within 30 s by neurons."""

FLOOR = 0.1
"""Of the steepest input's slope, which every input counts with at least: lines may be flat where relaxations are wide.
Of ACAS Xu's property 1, networks 2_8 and 3_1 took 889 and 153 boxes with it; without, 30,000 did not suffice."""

BATCH = 512
"""Boxes that are halved in one round."""


def few_inputs(problem: Problem) -> bool:
    """Whether all sets are boxes that vary in ``INPUTS`` inputs at most."""
    wide = (problem.region.hull.radius > 0).flatten(1).sum(1)
    return problem.region.is_box and bool((wide <= INPUTS).all())


@dataclass(frozen=True)
class _Boxes(Frontier):
    """Open ones, P of them, of the images numbered ``image`` (P,); ``cut`` (P,) is the input to halve them at."""

    lower: Tensor
    upper: Tensor
    bound: Tensor
    cut: Tensor

    def halves(self) -> _Boxes:
        lower, upper = self.lower.flatten(1), self.upper.flatten(1)
        at = self.cut.unsqueeze(1)
        middle = _middle(lower.gather(1, at), upper.gather(1, at))
        left = _Boxes(self.image, self.lower, upper.scatter(1, at, middle).reshape(self.upper.shape), *self._rest())
        right = _Boxes(self.image, lower.scatter(1, at, middle).reshape(self.lower.shape), self.upper, *self._rest())
        return left.joined(right)

    def _rest(self) -> tuple[Tensor, Tensor]:
        return self.bound, self.cut


def _middle(lower: Tensor, upper: Tensor) -> Tensor:
    return lower + (upper - lower) / 2


def split_inputs(
    problem: Problem, known: Known, timeout: float, violates: Callable[[int, Tensor], bool], batch: int = BATCH
) -> Outcome:
    """Prove or refute what ``known`` leaves open of problems over boxes.

    Args:
        timeout: seconds of each image's share of the time; as many again on the wall clock for each image at most. The
            wall clock is looked at within rounds; what a round has begun by then counts as not begun.
        violates: whether an input (*shape) of the given image's region is a counterexample, by replay.
    """
    return _Splitting(problem, known, timeout, violates, batch).run()


class _Splitting:
    def __init__(self, problem: Problem, known: Known, timeout: float, violates, batch: int):
        self.problem, self.known, self.timeout, self.violates = problem, known, timeout, violates
        count = len(problem)
        rows, offsets = known.rows_of(problem.specification)
        members, _ = rows_of(problem.specification.clauses)
        self.bounds = BoxBounds(known.network, rows, offsets, members, known.bounds)
        self.batch = min(batch, rows_at_a_time(known.network, rows.shape[1], known.rows))
        self.lower = torch.full((count,), torch.inf, dtype=known.rows.dtype, device=known.rows.device)
        self.seconds = torch.zeros(count, dtype=torch.float64)
        self.counterexamples: list[Tensor | None] = [None] * count
        self.reasons: list[str | None] = [None] * count
        hull = known.region_of(problem).hull
        worst = problem.specification.worst(known.rows)
        everything = torch.arange(count, device=worst.device)
        self.open = _Boxes(everything, hull.lower, hull.upper, worst, torch.zeros_like(everything))

    def run(self) -> Outcome:
        try:
            with until(now() + self.timeout * len(self.problem)):
                self._search()
        except OutOfTime:
            self._give_up(set(self.open.image.tolist()), "wall clock")
        proved = self._wanted(torch.arange(len(self.problem)))
        return Outcome(proved, self.counterexamples, self.lower, self.seconds, self.reasons)

    def _search(self) -> None:
        roots, self.open = self.open, self.open.take(torch.arange(0))
        self._look_at(roots)
        while len(self.open):
            look()
            chosen = in_turns(self.open.image, self.open.bound, self.batch)
            left = torch.ones(len(self.open), dtype=torch.bool, device=chosen.device)
            left[chosen] = False
            parents, self.open = self.open.take(chosen), self.open.take(left.nonzero().flatten())
            self._look_at(parents.halves())

    def _look_at(self, boxes: _Boxes) -> None:
        """Bound boxes, try their likeliest points, keep those that stay open."""
        index = torch.arange(len(boxes), device=boxes.image.device)
        for part in index.split(2 * self.batch) if len(boxes) else ():
            started = now()
            some = boxes.take(part)
            images = some.image.cpu()
            try:
                self._bound(some)
            except OutOfTime:
                self.open = self.open.joined(boxes.take(index[part[0] :]))
                raise
            finally:
                share = (now() - started) / len(part)
                self.seconds.index_add_(0, images, torch.full((len(part),), share, dtype=torch.float64))
            self._give_up({i for i in set(images.tolist()) if self.seconds[i] > self.timeout}, "timeout")

    def _bound(self, boxes: _Boxes) -> None:
        region = Box(boxes.lower, boxes.upper)
        clauses, form = self.bounds(region, boxes.image)
        bound = torch.maximum(boxes.bound, clauses.amin(1))
        open_ = ~(bound > 0)
        worst = form[torch.arange(len(form), device=form.device), clauses.argmin(1)]
        self._try(boxes.take(open_.nonzero().flatten()), region.take(open_), worst[open_])
        cut, at_end = self._cut(boxes, form, clauses)
        stuck = {int(image) for image in boxes.image[open_ & at_end]}
        keep = open_ & ~at_end & self._wanted(boxes.image)
        self._close(boxes.image[~keep], bound[~keep])
        kept = _Boxes(boxes.image, boxes.lower, boxes.upper, bound, cut).take(keep.nonzero().flatten())
        self.open = self.open.joined(kept)
        for image in stuck:
            if self.counterexamples[image] is None:
                self._give_up({image}, "within tolerance")

    def _cut(self, boxes: _Boxes, form: Tensor, clauses: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) the input to halve each box at, and whether floats lie too dense for any cut."""
        lower, upper = boxes.lower.flatten(1), boxes.upper.flatten(1)
        middle = _middle(lower, upper)
        splittable = (lower < middle) & (middle < upper)
        slope = (form.flatten(2).abs() * ~(clauses > 0).unsqueeze(-1)).sum(1)
        slope = torch.maximum(slope, FLOOR * slope.amax(1, keepdim=True))
        variation = slope * (upper - lower)
        # a bound that does not vary says nothing: then the widest
        variation = torch.where(splittable, variation.nan_to_num(0.0) + 1e-30 * (upper - lower), -torch.inf)
        return variation.argmax(1), ~splittable.any(1)

    def _try(self, boxes: _Boxes, region: Box, form: Tensor) -> None:
        """Centres, and where the bound of the worst clause, the form (P, *shape), is smallest."""
        if not len(boxes):
            return
        corners = torch.where(form > 0, region.lower, torch.where(form < 0, region.upper, region.images))
        specification = self.problem.specification.subset(boxes.image)
        own = self.problem.region.take(boxes.image)
        for points in (own.nearest(corners), own.nearest(region.images)):
            outputs = self.known.network(points.to(self.known.rows.dtype))
            wrong = ~(specification.worst(specification.values(outputs)) > 0)
            for number in wrong.nonzero().flatten().tolist():
                image = int(boxes.image[number])
                if self.counterexamples[image] is None and self.violates(image, points[number]):
                    self.counterexamples[image] = points[number]
                    self._drop({image})

    def _wanted(self, image: Tensor) -> Tensor:
        over = [c is not None or r is not None for c, r in zip(self.counterexamples, self.reasons, strict=True)]
        return ~torch.tensor(over, dtype=torch.bool, device=image.device)[image]

    def _close(self, image: Tensor, bound: Tensor) -> None:
        self.lower.scatter_reduce_(0, image, bound.to(self.lower.dtype), "amin")

    def _give_up(self, images: set[int], reason: str) -> None:
        for image in images:
            unfinished = reason == "within tolerance" or bool((self.open.image == image).any())
            if unfinished and self.counterexamples[image] is None and self.reasons[image] is None:
                self.reasons[image] = reason
        self._drop({image for image in images if self.reasons[image] is not None})

    def _drop(self, images: set[int]) -> None:
        gone = torch.zeros(len(self.problem), dtype=torch.bool, device=self.open.image.device)
        gone[list(images)] = True
        gone = gone[self.open.image]
        self._close(self.open.image[gone], self.open.bound[gone])
        self.open = self.open.take((~gone).nonzero().flatten())
