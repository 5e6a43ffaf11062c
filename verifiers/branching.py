"""Scores for the choice of the neuron to split, from a linear bound.

The upper line of a ReLU lowers a bound by at most |coefficient| · intercept (BaBSR's leading term, arXiv 1909.06588);
at the bound's minimiser it lowers it by |coefficient| times the line's distance from the function there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bounds import Region
from ..bounds.network import Network
from .optimise import Columns, Neurons, Optimised


def minimiser(optimised: Optimised, region: Region, row: Tensor) -> Tensor:
    """(D, *shape) points of the region's hull where the linear bound of row number ``row`` (D,) is smallest."""
    hull = region.hull
    chosen = optimised.forms[torch.arange(len(row), device=row.device), row]
    return torch.where(chosen > 0, hull.lower, torch.where(chosen < 0, hull.upper, hull.center))


def scores(
    network: Network, optimised: Optimised, columns: Columns, lower: Tensor, upper: Tensor, row: Tensor, point: Tensor
) -> Tensor:
    """(D, U) score of each neuron in ``columns``: by how much its relaxation lowers the bound at most, plus at the
    bound's minimiser; -inf for stable neurons.

    Args:
        lower, upper: (D, U) bounds of the neurons' inputs.
        row: (D,) the row of each subproblem whose bound is to be improved; point: (D, *shape), its minimiser.
    """
    neurons = Neurons.of(network)
    if not neurons.places:
        return lower
    each = torch.arange(len(row), device=row.device)
    forms, alphas = optimised.reached[each, row], optimised.alphas[each, row]
    values = network.values(point)
    flat = torch.cat([values[network.operations[place].inputs[0]].flatten(1) for place in neurons.places], 1)
    inputs = columns.gathered(flat, 0.0)
    unstable = (lower < 0) & (upper > 0) & columns.real
    width = torch.where(unstable, upper - lower, 1.0)
    kinks = torch.cat([
        lower.new_full((size,), network.nonlinear_at(place).kink)
        for place, size in zip(neurons.places, columns.sizes, strict=True)
    ])  # fmt: skip
    outputs = torch.maximum(inputs, kinks * inputs)
    intercept = (1 - kinks) * -lower * upper / width
    slope = (upper - kinks * lower) / width
    over = slope * inputs + intercept - outputs  # the upper line above the function, at the minimiser
    under = outputs - torch.where(unstable, alphas, 1.0) * inputs
    here = torch.where(forms < 0, -forms * over, forms * under.clamp(min=0))
    worst = -forms.clamp(max=0) * intercept
    return torch.where(unstable, worst + here.clamp(min=0), -torch.inf)
