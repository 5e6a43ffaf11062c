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
from .neurons import Columns
from .optimise import Optimised

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


def gains(optimised: Optimised, kinks: Tensor, lower: Tensor, upper: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """(negative, positive): by how much at most the bound of row number ``row`` (D,) rises in each half, at the same
    parameters, (D, U) each, for unstable neurons. To first order it rises by as much.

    Args:
        optimised: with ``values``.
        kinks: (U,) slopes left of 0.
        lower, upper: (D, U) bounds of the neurons' inputs.
    """
    each = torch.arange(len(row), device=row.device)
    forms, alphas, values = (part[each, row] for part in (optimised.reached, optimised.alphas, optimised.values))
    width = torch.where((lower < 0) & (upper > 0), upper - lower, 1.0)
    upper_line = (upper - kinks * lower) / width * values - (1 - kinks) * lower * upper / width
    line = forms * torch.where(forms < 0, upper_line, torch.maximum(alphas, kinks) * values)
    return forms * kinks * values - line, forms * values - line


def scores(
    optimised: Optimised, columns: Columns, kinks: Tensor, lower: Tensor, upper: Tensor, row: Tensor, bound: Tensor
) -> Tensor:
    """(D, U) score of each neuron in ``columns``, the product of its halves' gains; -inf for stable neurons.

    Args:
        optimised, kinks, lower, upper, row: as for ``gains``.
        bound: (D,) the bound that is to be improved.
    """
    floor = FLOOR * bound.abs().unsqueeze(1)
    negative, positive = (gain.clamp(min=0) + floor for gain in gains(optimised, kinks, lower, upper, row))
    return torch.where((lower < 0) & (upper > 0) & columns.real, negative * positive, -torch.inf)
