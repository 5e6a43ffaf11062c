"""Which neuron to split: scores from a linear bound, and a look ahead at the best few.

The upper line of a ReLU costs a bound |coefficient| · intercept at most (BaBSR's leading term, arXiv 1909.06588); at
the point where the bound is smallest it costs what the line differs from the function there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..bounds import Region
from ..bounds.folded import Folded, Nonlinear
from .optimise import Neurons, Optimised
from .tree import Tree


def minimiser(found: Optimised, region: Region, row: Tensor) -> Tensor:
    """(D, *shape): where the linear bound of one row of each is smallest over the region's hull."""
    hull = region.hull
    chosen = found.bound.forms[torch.arange(len(row), device=row.device), row]
    return torch.where(chosen > 0, hull.lower, torch.where(chosen < 0, hull.upper, hull.center))


def scores(network: Folded, found: Optimised, lower: Tensor, upper: Tensor, row: Tensor, point: Tensor) -> Tensor:
    """(D, N) what each neuron's relaxation costs the bound: at the worst, and at the bound's own minimiser.

    Args:
        lower, upper: (D, N) bounds of the neurons' inputs; row: (D,) the row of each that is to be improved.
        point: (D, *shape), its minimiser.
    """
    neurons = Neurons.of(network)
    if not neurons.places:
        return lower
    each = torch.arange(len(row), device=row.device)
    forms = torch.cat([found.seen[place][each, row].flatten(1) for place in neurons.places], -1)
    values = network.values(point)
    inputs = torch.cat([values[network.operations[place].inputs[0]].flatten(1) for place in neurons.places], -1)
    outputs = torch.cat([values[place].flatten(1) for place in neurons.places], -1)
    unstable = (lower < 0) & (upper > 0)
    width = torch.where(unstable, upper - lower, 1.0)
    operations = [operation for operation in network.operations if isinstance(operation, Nonlinear)]
    kinks = torch.cat([
        torch.full((shape.numel(),), operation.activation.slope, dtype=lower.dtype)
        for operation, shape in zip(operations, neurons.shapes, strict=True)
    ]).to(lower.device)  # fmt: skip
    intercept = (1 - kinks) * -lower * upper / width
    slope = (upper - kinks * lower) / width
    over = slope * inputs + intercept - outputs  # the upper line above the function, at the minimiser
    alphas = found.alphas[each, row]
    under = outputs - torch.where(unstable, alphas, 1.0) * inputs
    here = torch.where(forms < 0, -forms * over, forms * under.clamp(min=0))
    worst = -forms.clamp(max=0) * intercept
    return torch.where(unstable, worst + here.clamp(min=0), -torch.inf)


class BoundsSubproblems(Protocol):
    def bounds_of(self, tree: Tree) -> Tensor:
        """(D,) lower bounds of the clauses that D subproblems are about."""
        ...


def look_ahead(search: BoundsSubproblems, tree: Tree, cost: Tensor, candidates: int) -> Tensor:
    """(D,) the column to split at: of the best-scored few, the one whose halves gain most, as a product, bounded with
    the parameters at hand (after filtered smart branching, arXiv 2002.10410; the worse half's bound alone is nearly
    the parent's for all of them, and chose neurons at random).

    Args:
        search: what bounds subproblems. tree: D of them; cost: (D, U), -inf for what cannot be split.
    """
    count = min(candidates, cost.shape[1])
    best, columns = cost.topk(count, dim=1)
    if count == 1:
        return columns[:, 0]
    gains: list[Tensor] = []
    for place in range(count):
        at = columns[:, place : place + 1]
        halves = [search.bounds_of(replace(tree, signs=tree.signs.scatter(1, at, sign))) for sign in (1, -1)]
        first, second = ((half.clamp(max=0) - tree.bound).clamp(min=0) for half in halves)  # a closed half is enough
        floor = 1e-3 * tree.bound.abs()
        gains.append(torch.where(best[:, place] > -torch.inf, (first + floor) * (second + floor), -torch.inf))
    return columns.gather(1, torch.stack(gains, 1).argmax(1, keepdim=True))[:, 0]
