"""Descent of many points at once, each in its own set and on its own clause, as the stage ``falsify`` and every search
use it.

A step moves each input by a share of the width of its own interval, so that boxes whose inputs differ by orders of
magnitude are crossed alike. A point where the gradient is 0, as behind dead ReLUs, is drawn anew. Three of four points
start with a share of the slopes of the activations' chords (``chords.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from ..bounds import Bounds, memory
from ..bounds.clock import look
from ..bounds.crown import backward, relax_all, rows_at_a_time
from ..bounds.network import Network
from ..noise import Noise, key_of
from ..typed import as_ints
from .bounds_so_far import BoundsSoFar
from .branching import least_point
from .chords import Chords
from .problem import Problem, Specification

SHARES = (0.5, 0.0, 0.25, 0.5)
"""Shares of the chords' slopes in the first step of points by their stream, in turns; they fall to 0 in equal parts."""

Refute = Callable[[int, Tensor], bool]
"""Replays a candidate (*shape) for the image of the given number; returns whether that image is refuted, by this
candidate or before. It may raise to end everything."""


@dataclass(frozen=True)
class Points:
    """P points to descend from.

    Args:
        image: (P,) int64, the number of each point's problem; clause: (P,) int64, the clause it is to violate.
        points: (P, *shape), in the problems' sets.
        stream: (P,) int64, with image and clause the key of its random numbers.
    """

    image: Tensor
    clause: Tensor
    points: Tensor
    stream: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: Tensor) -> Self:
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})


def descend(
    problem: Problem,
    chords: Chords,
    members: Tensor,
    start: Points,
    refute: Refute,
    *,
    steps: int,
    first: float,
    last: float,
    key: int,
) -> None:
    """Descend by gradient signs on the largest row of each point's clause. A point is passed to ``refute`` when it
    first violates its clause, and where its descent ends if it violates any clause. Points of refuted images stop.

    Args:
        chords: of the problems' activations.
        members: (C, G) the rows of each clause, as ``rows_of_clauses`` gives them.
        steps: steps of each point; ``first``, ``last``: their sizes, falling geometrically, in widths of the hull.
        key: of the random numbers.
    Raises:
        OutOfTime: the clock ran out.
    """
    active, asked = start, torch.zeros(len(start), dtype=torch.bool, device=start.image.device)
    own = chords.take(start.image)
    share = torch.tensor(SHARES, dtype=chords.dtype, device=start.image.device)[start.stream % len(SHARES)]
    for step in range(steps + 1):
        look()
        region = problem.region.take(active.image)
        with torch.enable_grad():
            at = active.points.detach().requires_grad_()
            logits = own(at, share * (1 - step / max(1, steps)))
            largest = _largest_row(problem.specification, members, active, logits)
            goal = largest.sum()
        wrong = ~(largest.detach() > 0) & ~asked
        if step == steps:
            wrong = ~(problem.specification.worst_at(active.image, logits.detach()) > 0)
        asked = asked | wrong
        left = torch.ones_like(asked)
        for number in as_ints(wrong.nonzero()):
            image = int(active.image[number])
            if bool(left[number]) and refute(image, active.points[number]):
                left &= active.image != image
        if step == steps or not bool(left.any()):
            return
        look()
        (gradient,) = torch.autograd.grad(goal, at)
        gradient, hull = gradient.nan_to_num(0.0), region.hull
        size = first * (last / first) ** (step / steps)
        points = region.nearest(active.points - (2 * size * hull.radius) * gradient.sign())
        flat = ((gradient == 0) | (hull.radius == 0)).flatten(1).all(1)
        if bool(flat.any()):
            anew = random_points(problem, active.take(flat), key_of(key, "flat", step))
            points = points.index_put((flat.nonzero().flatten(),), anew)
        active, asked = replace(active, points=points), asked
        if not bool(left.all()):
            active, asked, own, share = active.take(left), asked[left], own.take(left), share[left]


def random_points(problem: Problem, some: Points, key: int) -> Tensor:
    """(P, *shape) points of the problems' sets: uniform in their hulls, then projected. Each depends on its own image,
    clause and stream alone."""
    region = problem.region.take(some.image)
    hull, shape, dtype = region.hull, region.images.shape[1:], region.images.dtype
    place = (problem.index[some.image] * (1 << 20) + some.clause) * (1 << 12) + some.stream
    share = Noise(key, place).uniform(shape, dtype=dtype)
    return region.nearest(hull.lower * (1 - share) + hull.upper * share)  # a difference of ends may overflow


def relaxed_minimisers(problem: Problem, known: BoundsSoFar, members: Tensor, some: Points) -> Tensor:
    """(P, *shape) points of the problems' sets at which CROWN's bound of the clause's highest row is smallest."""
    found: list[Tensor] = []
    network = known.network
    rows, offsets = known.forms_of(problem.specification)
    size = rows_at_a_time(network, members.shape[1], known.rows)
    for part in torch.split(torch.arange(len(some), device=some.image.device), size):
        look()
        image, own = some.image[part], members[some.clause[part]]
        bounds = {place: Bounds(ends.lower[image], ends.upper[image]) for place, ends in known.bounds.items()}
        region, at = known.region_of(problem).take(image), (image.unsqueeze(1), own)
        linear = backward(network, len(network.operations) - 1, rows[at], relax_all(network, bounds))
        row = (linear.lower(region) + offsets[at]).argmax(1)
        found.append(problem.region.take(image).nearest(least_point(linear.forms, region, row)))
    return torch.cat(found)


def points_at_a_time(network: Network, specification: Specification, like: Tensor) -> int:
    """Number of points whose activations, gradients, chords and clause's rows fit into a round's memory; at least 1."""
    rows = int(torch.bincount(specification.clauses).max())
    numbers = 6 * sum(shape.numel() for shape in network.shapes) + rows * specification.forms.shape[2]
    return max(1, memory.planned(like) // (numbers * like.element_size()))


def _largest_row(specification: Specification, members: Tensor, some: Points, logits: Tensor) -> Tensor:
    """(P,) the largest row of each point's own clause; where <= 0 the point is a counterexample."""
    at = (some.image.unsqueeze(1), members[some.clause])
    rows, offsets = specification.forms[at].to(logits.dtype), specification.offsets[at]
    return ((rows @ logits.unsqueeze(-1)).squeeze(-1) + offsets).amax(1)
