"""The choice of the neuron to split, from a linear bound.

A linear bound's minimiser x* gives each neuron's input a value v in the network of the lines that the bound uses. Where
a neuron with coefficient A < 0 is split, its upper line u is replaced by 0 in one half and by the input itself in the
other: to first order the bound rises by -A u(v) in the first half and by -A (u(v) - v) in the second. Both are upper
bounds of the rise at the current parameters, for all neurons at once, at the cost of one gradient; filtered smart
branching (arXiv 2002.10410) bounds both halves of each candidate to learn the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bounds import Region
from .optimise import Columns, Optimised

FLOOR = 1e-3
"""Least gain that a half counts with, relative to the bound: neurons that only help one half are told apart by it."""


def minimiser(optimised: Optimised, region: Region, row: Tensor) -> Tensor:
    """(D, *shape) points of the region's hull where the linear bound of row number ``row`` (D,) is smallest."""
    return least_point(optimised.forms, region, row)


def least_point(forms: Tensor, region: Region, row: Tensor) -> Tensor:
    """(D, *shape) points of the region's hull where the linear form number ``row`` (D,) of ``forms`` (D, R, *shape) is
    smallest."""
    hull = region.hull
    chosen = forms[torch.arange(len(row), device=row.device), row]
    return torch.where(chosen > 0, hull.lower, torch.where(chosen < 0, hull.upper, hull.center))


def scores(
    optimised: Optimised, columns: Columns, kinks: Tensor, lower: Tensor, upper: Tensor, row: Tensor, bound: Tensor
) -> Tensor:
    """(D, U) score of each neuron in ``columns``, the product of its halves' first-order gains; -inf for stable ones.

    Args:
        optimised: with ``values``.
        kinks: (U,) slopes left of 0.
        lower, upper: (D, U) bounds of the neurons' inputs.
        row: (D,) the row of each subproblem whose bound is to be improved; bound: (D,), that bound.
    """
    each = torch.arange(len(row), device=row.device)
    forms, alphas, values = (part[each, row] for part in (optimised.reached, optimised.alphas, optimised.values))
    unstable = (lower < 0) & (upper > 0) & columns.real
    width = torch.where(unstable, upper - lower, 1.0)
    upper_line = (upper - kinks * lower) / width * values - (1 - kinks) * lower * upper / width
    line = forms * torch.where(forms < 0, upper_line, torch.maximum(alphas, kinks) * values)
    floor = FLOOR * bound.abs().unsqueeze(1)
    negative, positive = ((forms * slope * values - line).clamp(min=0) + floor for slope in (kinks, 1.0))
    return torch.where(unstable, negative * positive, -torch.inf)
