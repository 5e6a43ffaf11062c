"""The exact minimum of a small piecewise-linear network over a box, as a mixed-integer program.

Every unit whose sign is open gets a binary variable, with big-M constants from the bounds of its input (arXiv
1711.07356). HiGHS meets constraints up to tolerances only, so its lower bound is no certificate: a reference value for
tests alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds as VariableBounds
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from certtrain.bounds import Bounds, Region, clock
from certtrain.bounds.network import Network
from certtrain.bounds.operations import Nonlinear
from certtrain.errors import InputError
from certtrain.verifiers.lp import check_box


@dataclass(frozen=True)
class Exact:
    """Minima of C clauses over the region around one image.

    Args:
        values: (C,) what the network itself gives at ``points``: never below the minimum, but for rounding.
        bounds: (C,) HiGHS's lower bounds of the minima: up to its tolerances only, some 1e-6 of the neurons' size.
        points: (C, *shape), in the region: the best found, the image itself where none was.
        optimal: (C,) bool, whether HiGHS closed the gap, to 1e-6.
    """

    values: Tensor
    bounds: Tensor
    points: Tensor
    optimal: Tensor


@torch.no_grad()
def minimum(
    network: Network,
    region: Region,
    rows: Tensor,
    offsets: Tensor,
    bounds: Mapping[int, Bounds],
    time_limit: float = math.inf,
    *,
    clauses: Tensor | None = None,
    position: int | None = None,
) -> Exact:
    """For each clause the minimum over the region of its largest row <row, logits> + offset.

    Args:
        network: float64, of ReLU and LeakyReLU.
        region: a box around one image, float64.
        rows: (1, R, K); offsets: (1, R).
        bounds: of every non-linear operation's input, valid on the region (``crown_bounds``, ``interval_bounds``).
        time_limit: in seconds, for all clauses together; the clock's too.
        clauses: (R,) int64, the clause of each row, as in ``Specification``; None makes each row its own.
        position: of an operation whose output, of K numbers, is looked at instead of the logits.
    Raises:
        InputError: the region is no box, holds several images or is not float64; a function is not piecewise linear.
    """
    check_box(region)
    if not network.piecewise_linear:
        raise InputError("network: found a smooth activation; accepted for a mixed-integer program: ReLU, LeakyReLU")
    place = len(network.operations) - 1 if position is None else position
    program = _Program(network, region, bounds, place)
    clauses = torch.arange(rows.shape[1]) if clauses is None else clauses.cpu()
    deadline = clock.now() + min(time_limit, clock.left())
    found = [
        program.minimise(rows[0, clauses == clause].flatten(1), offsets[0, clauses == clause], deadline)
        for clause in clauses.unique()
    ]
    points = torch.cat([region.images[:0], *(point for point, _, _ in found)])
    values = network.values(points)[place].flatten(1) @ rows[0].flatten(1).T + offsets[0]
    members = clauses[None, :] == clauses.unique()[:, None]
    values = torch.where(members.to(values.device), values, -torch.inf).amax(1)
    below = values.new_tensor([bound for _, bound, _ in found])
    return Exact(values, below, points, torch.tensor([done for _, _, done in found], dtype=torch.bool))


class _Program:
    """Variables u = (place in the box, in [-1, 1]; outputs y of the open units), and a binary for each open unit.

    Every number of the network is affine in u. A stack (1 + columns, *shape) holds its constant, then its coefficients.
    """

    def __init__(self, network: Network, region: Region, bounds: Mapping[int, Bounds], position: int):
        self.network, self.region, self.bounds = network, region, bounds
        places = [place for place in network.nonlinear if place <= position]
        self.open = {place: ((bounds[place].lower < 0) & (bounds[place].upper > 0)).flatten() for place in places}
        self.pixels, self.units = region.images.numel(), sum(int(mask.sum()) for mask in self.open.values())
        self.columns = self.pixels + self.units
        self.ends = [(-np.ones(self.pixels), np.ones(self.pixels))]
        self.matrices: list[np.ndarray] = []  # of the constraints matrix · (u, binaries) <= limit
        self.limits: list[np.ndarray] = []
        self.output = self._stacks(position).flatten(1)

    def _stacks(self, position: int) -> Tensor:
        hull = self.region.hull
        directions = torch.diag(hull.radius.flatten()).reshape(-1, *hull.center.shape[1:])
        stacks = {0: torch.cat([hull.center, directions, hull.center.new_zeros(self.units, *hull.center.shape[1:])])}
        for number, operation in enumerate(self.network.operations[: position + 1]):
            clock.look()
            if isinstance(operation, Nonlinear):
                slope = operation.kink
                stacks[number] = self._activate(number, slope, stacks[operation.inputs[0]])
            elif number:
                inputs = [stacks[read] for read in operation.inputs]
                moved, fixed = operation(*inputs), operation(*(torch.zeros_like(stack[:1]) for stack in inputs))  # type: ignore[operator]
                stacks[number] = torch.cat([moved[:1], moved[1:] - fixed])
        return stacks[position]

    def _activate(self, place: int, slope: float, stack: Tensor) -> Tensor:
        """y >= z, y >= slope z, y <= z - (1 - slope) lower (1 - binary), y <= slope z + (1 - slope) upper binary."""
        inputs, unit = stack.flatten(1), self.open[place].nonzero().flatten()
        lower, upper = self.bounds[place].lower.flatten(), self.bounds[place].upper.flatten()
        outputs = inputs * torch.where(lower >= 0, torch.ones_like(lower), slope)
        outputs[:, unit] = 0.0
        first = sum(len(low) for low, _ in self.ends)
        outputs[1 + first + torch.arange(len(unit), device=unit.device), unit] = 1.0

        z, low, high = inputs[:, unit].T.cpu().numpy(), lower[unit].cpu().numpy(), upper[unit].cpu().numpy()
        y, binary = np.eye(len(unit), self.columns, first), np.eye(len(unit), self.units, first - self.pixels)
        down, up = (1 - slope) * low, (1 - slope) * high
        self.matrices += [
            np.hstack([z[:, 1:] - y, 0 * binary]),
            np.hstack([slope * z[:, 1:] - y, 0 * binary]),
            np.hstack([y - z[:, 1:], -down[:, None] * binary]),
            np.hstack([y - slope * z[:, 1:], -up[:, None] * binary]),
        ]
        self.limits += [-z[:, 0], -slope * z[:, 0], z[:, 0] - down, slope * z[:, 0]]
        self.ends.append((slope * low, high))
        return outputs.reshape(stack.shape)

    def minimise(self, rows: Tensor, offsets: Tensor, deadline: float) -> tuple[Tensor, float, bool]:
        """Of the largest of the rows (R, K): its minimiser (1, *shape), HiGHS's lower bound, whether it is optimal."""
        objective = (rows @ self.output.T).cpu().numpy()
        largest = np.hstack([objective[:, 1:], np.zeros((len(rows), self.units)), -np.ones((len(rows), 1))])
        units = np.vstack([*self.matrices, np.zeros((0, self.columns + self.units))])
        table = np.vstack([np.hstack([units, np.zeros((len(units), 1))]), largest])
        limits = np.concatenate([*self.limits, -objective[:, 0] - offsets.cpu().numpy()])
        low = np.concatenate([*(low for low, _ in self.ends), np.zeros(self.units), [-np.inf]])
        high = np.concatenate([*(high for _, high in self.ends), np.ones(self.units), [np.inf]])
        options = {"mip_rel_gap": 0.0}
        if deadline < math.inf:
            options["time_limit"] = max(deadline - clock.now(), 0.0)
        found = milp(
            np.eye(1, len(low), len(low) - 1)[0],
            integrality=np.repeat([0, 1, 0], [self.columns, self.units, 1]),
            bounds=VariableBounds(low, high),
            constraints=LinearConstraint(csr_array(table), -np.inf, limits),
            options=options,
        )
        images, hull = self.region.images, self.region.hull
        bound = found.mip_dual_bound if self.units else found.fun  # HiGHS gives a linear program no dual bound
        bound = -math.inf if bound is None else float(bound)
        if found.x is None:
            return images, bound, False
        share = torch.from_numpy(found.x[: self.pixels]).to(images.device).reshape(images.shape)
        return self.region.nearest(hull.center + share * hull.radius), bound, found.status == 0
