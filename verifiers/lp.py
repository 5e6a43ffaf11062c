"""Linear programs of subproblems: where the sign of every neuron is known, the minimum is that of a linear program.

The solver's value is not trusted. It proposes multipliers, and the bound is the Lagrangian at them, evaluated in
float64: for *any* multipliers >= 0 it is below the minimum (weak duality), so a solver that is wrong or stops early
costs only tightness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bounds import Bounds, Region, clock
from ..bounds.crown import backward, relax_all, rows_at_a_time
from ..bounds.network import Network
from ..errors import InputError
from .neurons import Neurons
from .optimise import Subproblems, maximise

ROUNDING = 1e-12
"""Amount by which a Lagrangian is lowered, relative to the sum of its terms' absolute values: thousands of float64
roundings of each. So huge multipliers, as of a nearly empty leaf, cannot turn rounding into a proof."""

TOLERANCE = 1e-9
"""Feasibility tolerance of HiGHS, for constraints whose coefficients add up to 1."""


@dataclass(frozen=True)
class LeafSolution:
    """The solution of a leaf's linear program.

    Args:
        bound: lower bound of the minimum in float64 arithmetic, whatever the solver did; inf if the leaf is empty.
        point: (*shape), the program's minimiser in the box, a candidate for a counterexample (to be replayed); None
            where the program was not solved.
        infeasible: whether the leaf is proved empty.
        weights: the multipliers that prove ``bound``, of the rows and then of the constraints (``lagrangian``); None
            where numbers are not finite.
    """

    bound: float
    point: Tensor | None
    infeasible: bool = False
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LinearProgram:
    """Minimise the largest of the first G rows forms[j] · x + constants[j] over a box, where the M others are <= 0.

    Args:
        region: a box around one image, float64, on the CPU.
        forms: (G + M, D), D the number of entries of the image; constants: (G + M,).
        goals: G.
    """

    region: Region
    forms: Tensor
    constants: Tensor
    goals: int = 1

    def lagrangian(self, weights: Tensor) -> float:
        """The minimum over the box of all rows' weighted sum, lowered by ``ROUNDING``. Weights below 0 count as 0.

        If the first G weights add up to 1, it is a lower bound of the program's minimum. If they are 0, a value above 0
        proves that no point meets the constraints.

        Args:
            weights: (G + M,) float64.
        """
        weights = weights.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        images, hull = self.region.images, self.region.hull
        lowest = self.region.concretise((weights @ self.forms).reshape(1, 1, *images.shape[1:]))
        largest = torch.maximum(hull.lower.abs(), hull.upper.abs()).flatten()
        size = weights @ (self.forms.abs() @ largest + self.constants.abs())
        value = float(lowest + weights @ self.constants - ROUNDING * size)
        return -math.inf if math.isnan(value) else value

    def solve(self, time_limit: float = math.inf) -> LeafSolution:
        """Solve the program.

        Args:
            time_limit: seconds for each of up to three calls of HiGHS, besides the clock's limit.
        """
        goals = self.goals
        single = torch.eye(goals, len(self.constants), dtype=torch.float64)
        if not (self.forms.isfinite().all() and self.constants.isfinite().all()):
            return LeafSolution(-math.inf, None)
        # in units of the box, [-1, 1]^D, and every row in units of its own size: HiGHS's tolerances are absolute
        hull = self.region.hull
        center, radius = hull.center.flatten(), hull.radius.flatten()
        matrix, vector = self.forms * radius, self.forms @ center + self.constants
        size = matrix.abs().sum(1) + vector.abs()
        size[:goals] = size[:goals].max()  # one unit for the goals, which are compared with each other
        size = torch.where(size > 0, size, 1.0)
        # the last variable is above the goals and, like them, in [-1, 1]
        above = torch.zeros(len(size), 1, dtype=torch.float64)
        above[:goals] = -1.0
        table, limits = torch.cat([matrix / size[:, None], above], 1).numpy(), -(vector / size).numpy()
        cost = np.eye(1, table.shape[1], table.shape[1] - 1)[0]

        result = _highs(cost, table, limits, time_limit)
        bound, best = max(((self.lagrangian(weights), weights) for weights in single), key=lambda pair: pair[0])
        if result.status != 0:
            slack = _least_slack(table[goals:, :-1], limits[goals:], time_limit)
            if slack.status != 0:
                return LeafSolution(bound, None, weights=best)
            multipliers = _multipliers(slack) / size[goals:]
            weights = torch.cat([torch.zeros(goals, dtype=torch.float64), multipliers])
            if self.lagrangian(weights) > 0:
                return LeafSolution(math.inf, None, infeasible=True, weights=weights)
            # nearly empty: solve with the constraints loosened by their least slacks; any multipliers are valid
            limits[goals:] += slack.x[table.shape[1] - 1 :] + TOLERANCE
            result = _highs(cost, table, limits, time_limit)
        if result.status != 0:
            return LeafSolution(bound, None, weights=best)
        images = self.region.images
        point = (center + radius * torch.as_tensor(result.x[:-1])).reshape(images.shape)
        # back in the rows' own units; the goals' weights are made to add up to 1
        multipliers = _multipliers(result)
        shares, total = multipliers[:goals].clamp(min=0), float(multipliers[:goals].clamp(min=0).sum())
        shares = shares / total if 0 < total < math.inf else single[0, :goals]
        weights = torch.cat([shares, multipliers[goals:] * size[0] / size[goals:]])
        point = self.region.nearest(point)[0]
        solved_bound = self.lagrangian(weights)
        bound, best = (solved_bound, weights) if solved_bound > bound else (bound, best)
        return LeafSolution(bound, point, weights=best)


def _multipliers(result: Any) -> Tensor:
    """The solver's multipliers, one for each constraint; those that are not finite become 0."""
    return torch.as_tensor(-np.asarray(result.ineqlin.marginals)).nan_to_num(0.0, 0.0, 0.0)


def _highs(cost: np.ndarray, rows: np.ndarray, limits: np.ndarray, time_limit: float, boxed: int | None = None) -> Any:
    """Minimise cost · u subject to rows · u <= limits, -1 <= u <= 1 for the first ``boxed`` entries (None: all), and
    0 <= u for the rest."""
    boxed = len(cost) if boxed is None else boxed
    ends = [(-1.0, 1.0)] * boxed + [(0.0, None)] * (len(cost) - boxed)
    options = {"primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE}
    left = clock.left()
    if min(time_limit, left) < math.inf:
        options["time_limit"] = max(min(time_limit, left), 0.0)
    from scipy.optimize import linprog  # 0.3 s of a process that may need no linear program

    result = linprog(cost, rows, limits, bounds=ends, method="highs", options=options)
    if result.status == 1 and left <= time_limit:
        clock.look(seconds=math.inf)
    return result


def _least_slack(rows: np.ndarray, limits: np.ndarray, time_limit: float) -> Any:
    """Phase one: the slacks of least sum with which the constraints can be met. A solution always exists."""
    count, width = rows.shape
    cost = np.concatenate([np.zeros(width), np.ones(count)])
    return _highs(cost, np.concatenate([rows, -np.eye(count)], 1), limits, time_limit, boxed=width)


def check_box(region: Region) -> None:
    """
    Raises:
        InputError: the region is no box, holds several images, or is not float64.
    """
    if not region.is_box or len(region.images) != 1 or region.images.dtype != torch.float64:
        raise InputError(
            f"region: found {len(region)} of {region.kind}, {region.images.dtype}; "
            "accepted for a linear program: a box (LinfBall) around one image, torch.float64"
        )


@torch.no_grad()
def leaf_program(
    network: Network, region: Region, rows: Tensor, offsets: Tensor, lower: Tensor, upper: Tensor, signs: Tensor
) -> LinearProgram:
    """The linear program of a leaf; arguments and errors as for ``solve_leaf``."""
    check_box(region)
    neurons = Neurons.of(network)
    uppers = neurons.apart(upper[None])
    lines = relax_all(network, {place: Bounds(low, uppers[place]) for place, low in neurons.apart(lower[None]).items()})
    parts = [backward(network, len(network.operations) - 1, rows[None], lines)]
    for place, shape in zip(neurons.places, neurons.shapes, strict=True):
        if len(network.operations[place].inputs) > 1:
            continue  # no sign is assumed of their inputs
        assumed = neurons.apart(signs)[place].flatten()
        for index in torch.split(assumed.nonzero().flatten(), rows_at_a_time(network, 1, lower)):
            # the lower line of -sign · input, which the constraint keeps at 0 or below
            forms = lower.new_zeros(1, len(index), shape.numel())
            forms[0].scatter_(1, index[:, None], -assumed[index, None].to(lower.dtype))
            parts.append(backward(network, network.operations[place].inputs[0], forms.reshape(1, -1, *shape), lines))
    constants = torch.cat([part.constants[0] for part in parts])
    constants[: len(rows)] += offsets
    forms = torch.cat([part.forms[0].flatten(1) for part in parts])
    return LinearProgram(region.map(Tensor.cpu), forms.cpu(), constants.cpu(), len(rows))


def solve_leaf(
    network: Network,
    region: Region,
    rows: Tensor,
    offsets: Tensor,
    lower: Tensor,
    upper: Tensor,
    signs: Tensor,
    time_limit: float = math.inf,
) -> LeafSolution:
    """Bound the minimum, over a leaf of branch and bound, of the largest <row, logits> + offset.

    Where every neuron's sign is known a network of ReLUs is affine, so the bound is the minimum up to rounding and the
    solver's tolerance. A neuron that is still unstable, and every other function, is relaxed by its lines: the bound
    holds, but is not tight.

    Args:
        network: float64, of ReLU and LeakyReLU; other functions are relaxed.
        region: a box around one image, float64.
        rows: (G, K), of one clause; offsets: (G,).
        lower, upper: (N,) bounds of the neurons' inputs (``Neurons``), valid in the leaf.
        signs: (N,) int8, assumed sign of each neuron's input: 1 for >= 0, -1 for <= 0, 0 for none.
        time_limit: seconds for each of up to three calls of HiGHS, besides the clock's limit.
    Raises:
        OutOfTime: the clock ran out while the program was made or solved.
        InputError: the region is no box, holds several images, or is not float64.
    """
    leaf = leaf_program(network, region, rows, offsets, lower, upper, signs).solve(time_limit)
    point = None if leaf.point is None else leaf.point.to(region.images.device)
    return replace(leaf, point=point)


def rounded_bound(network: Network, inside: Subproblems, leaf: LeafSolution) -> float:
    """A leaf's bound in the arithmetic of ``network.rounding``, which its linear program does not cover: a linear bound
    that does, at the program's multipliers. -inf for a clause of several rows, whose weighted sum rounds too.

    Args:
        inside: the leaf as one subproblem, in float64.
    """
    if leaf.weights is None or inside.forms.shape[1] > 1:
        return -math.inf
    signs, empty = inside.signs, not bool(leaf.weights[0] > 0)
    assert signs is not None
    betas = torch.zeros_like(inside.lower).masked_scatter(signs != 0, leaf.weights[1:].to(signs.device)).unsqueeze(1)
    if empty:  # a positive bound of the zero form proves infeasibility
        inside = replace(inside, forms=torch.zeros_like(inside.forms), offsets=torch.zeros_like(inside.offsets))
    bound = float(maximise(network, inside, torch.zeros_like(betas), betas.clamp(min=0), steps=0).best)
    return bound if not empty else math.inf if bound > 0 else -math.inf
