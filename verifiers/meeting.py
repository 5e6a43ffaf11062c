"""Search for points at which equalities hold exactly, which descents alone hit by luck.

Descents end beside the set where both rows of an equality are 0, and Newton's steps on its rows lead onto it up to
rounding. Of the floats around, which differ in the last bits of the inputs, some give the same outputs exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds.clock import look
from ..noise import Noise, key_of
from ..typed import as_ints, unique
from .descent import Points, Refute, random_points
from .problem import Problem

STARTS, STEPS, FIRST, LAST = 32, 30, 0.25, 0.003
"""Starts of a clause, the steps of each, and the first and the last in widths of the set."""

NEWTON = 6
"""Newton's steps of each point."""

BEST, AROUND, REPLAYED = 6, 512, 48
"""Best points of a clause, floats around each of them, and the best of these, which are replayed."""

ULPS = 4
"""Largest distance of the floats around a point, in units in the last place of each input."""

ROWS, PAIRS = 32, 1 << 24
"""Most rows of a clause that is searched, and most pairs of rows in all clauses."""


@dataclass(frozen=True)
class _Clause:
    """A clause of one image: rows that are to be 0, and rows that are to be <= 0."""

    image: int
    clause: int
    equal: Tensor
    most: Tensor


def meet(problem: Problem, members: Tensor, open_: Tensor, refute: Refute, seed: int, most: int) -> None:
    """Pass to ``refute`` points at which the open clauses' equalities may hold, until an image is refuted.

    Args:
        members: (C, G) the rows of each clause. open_: (B, C) bool. most: most points that go through the network
            together.
    Raises:
        OutOfTime: the clock ran out.
    """
    size = members.shape[1]
    if not 1 < size <= ROWS or open_.numel() * size**2 > PAIRS:
        return
    done, (images, clauses) = set[int](), (open_ & _may_have_equalities(problem, members)).nonzero(as_tuple=True)
    for image, clause in zip(as_ints(images), as_ints(clauses), strict=True):
        found = None if image in done else _equalities(problem, members, image, clause)
        if found is not None and _search(problem, found, refute, seed, most):
            done.add(found.image)


def _may_have_equalities(problem: Problem, members: Tensor) -> Tensor:
    """(B, C) bool, whether two rows of a clause are opposite at a random point."""
    specification, offsets = problem.specification, problem.specification.offsets.double()
    place = torch.rand(
        specification.forms.shape[2] + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    place = place.to(offsets.device)
    values = specification.forms.to(torch.float64).values(place[1:].expand(len(offsets), -1)) + place[0] * offsets
    own = values[:, members]
    return ((own.unsqueeze(-1) + own.unsqueeze(-2)).abs() <= 1e-9 * own.abs().unsqueeze(-1)).flatten(2).any(-1)


def _equalities(problem: Problem, members: Tensor, image: int, clause: int) -> _Clause | None:
    """A clause by its equalities, pairs of opposite rows; None without any."""
    own = unique(members[clause])
    rows = problem.specification.forms.take(own.new_tensor([image])).part(own).dense()[0]
    offsets = problem.specification.offsets[image, own]
    whole = torch.cat([rows, offsets.unsqueeze(1).to(rows)], 1)
    size = whole.abs().amax(1)
    opposite = ((whole.unsqueeze(0) + whole.unsqueeze(1)).abs().amax(-1) <= 1e-12 * size) & (size > 0)
    first = opposite.triu(1).any(1)
    second = opposite.tril(-1).any(1)
    return _Clause(image, clause, own[first], own[~first & ~second]) if bool(first.any()) else None


def _search(problem: Problem, clause: _Clause, refute: Refute, seed: int, most: int) -> bool:
    count, key = min(STARTS, most), key_of(seed, "meet")
    image = torch.full((count,), clause.image, device=problem.index.device)
    streams = torch.arange(count, device=image.device)
    starts = Points(image, torch.full_like(image, clause.clause), problem.region.images[image], streams)
    points = torch.cat([starts.points[:1], random_points(problem, starts, key)[1:]])
    region = problem.region.take(image)
    for step in range(STEPS):
        look()
        with torch.enable_grad():
            at = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_distance(problem, clause, at).sum(), at)
        size = FIRST * (LAST / FIRST) ** (step / STEPS)
        points = region.nearest(points - 2 * size * region.hull.radius * gradient.nan_to_num(0.0).sign())
    for _ in range(NEWTON):
        look()
        points = region.nearest(_newton(problem, clause, points, region.hull.radius))
    order = _distance(problem, clause, points).detach().argsort()[:BEST]
    for number in as_ints(order):
        look()
        around = _around(problem, clause.image, points[number], min(AROUND, most), key_of(key, number))
        best = _distance(problem, clause, around).detach().argsort()[:REPLAYED]
        for point in around[best]:
            look()
            if refute(clause.image, point):
                return True
    return False


def _values(problem: Problem, image: int, rows: Tensor, points: Tensor) -> Tensor:
    """(P, R) the values of some rows of an image at points."""
    own = torch.full((1,), image, device=rows.device)
    forms = problem.specification.forms.take(own).part(rows).dense()[0].double()
    return problem.network(points).double() @ forms.T + problem.specification.offsets[image, rows].double()


def _distance(problem: Problem, clause: _Clause, points: Tensor) -> Tensor:
    """(P,) the largest violation of a clause's rows, at least 0; 0 where all hold."""
    both = _values(problem, clause.image, torch.cat([clause.equal, clause.most]), points)
    equal, most = both[:, : len(clause.equal)].abs(), both[:, len(clause.equal) :].clamp(min=0)
    return torch.cat([equal, most], 1).amax(1)


def _newton(problem: Problem, clause: _Clause, points: Tensor, radius: Tensor) -> Tensor:
    """The points after a step to where the equalities, and the other rows that are violated, are 0 if they are linear,
    with inputs moved in proportion to their widths."""
    rows = torch.cat([clause.equal, clause.most])
    with torch.enable_grad():
        at = points.detach().requires_grad_()
        values = _values(problem, clause.image, rows, at)
        slopes = [torch.autograd.grad(column.sum(), at, retain_graph=True)[0] for column in values.unbind(1)]
    wanted = values.detach().nan_to_num(0.0, 0.0, 0.0)
    wanted[:, len(clause.equal) :] *= wanted[:, len(clause.equal) :] > 0
    jacobian = torch.stack([slope.flatten(1).double() for slope in slopes], 1)
    jacobian = (
        jacobian.nan_to_num(0.0, 0.0, 0.0) * (wanted != 0).unsqueeze(-1) * radius.flatten(1).double().unsqueeze(1)
    )
    step = (jacobian.pinverse() @ wanted.unsqueeze(-1)).squeeze(-1) * radius.flatten(1).double()
    return (points.double() - step.nan_to_num(0.0).reshape(points.shape)).to(points)


def _around(problem: Problem, image: int, point: Tensor, count: int, key: int) -> Tensor:
    """(count, *shape) the point and floats around it, which differ by ``ULPS`` units in the last place at most, and by
    less among the first ones."""
    place = torch.arange(count, device=point.device)
    noise = Noise(key, place).uniform(point.shape, dtype=torch.float64)
    most = (ULPS * place / count).reshape(-1, *[1] * point.ndim)
    unit = torch.nextafter(point.abs(), torch.full_like(point, torch.inf)) - point.abs()
    moved = point.double() + ((2 * noise - 1) * most).round() * unit.double()
    some = problem.region.take(torch.full((count,), image, device=point.device))
    return some.nearest(moved.to(point))
