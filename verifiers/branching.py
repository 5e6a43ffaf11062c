"""Scores for the choice of the neuron to split, from a linear bound.

The upper line of a ReLU lowers a bound by at most |coefficient| · intercept (BaBSR's leading term, arXiv 1909.06588);
at the bound's minimiser it lowers it by |coefficient| times the line's distance from the function there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bounds import Region
from ..bounds.network import Network
from .optimise import Neurons, Optimised


def minimiser(optimised: Optimised, region: Region, row: Tensor) -> Tensor:
    """(D, *shape) points of the region's hull where the linear bound of row number ``row`` (D,) is smallest."""
    return least_point(optimised.bound.forms, region, row)


def least_point(forms: Tensor, region: Region, row: Tensor) -> Tensor:
    """(D, *shape) points of the region's hull where the linear form number ``row`` (D,) of ``forms`` (D, R, *shape) is
    smallest."""
    hull = region.hull
    chosen = forms[torch.arange(len(row), device=row.device), row]
    return torch.where(chosen > 0, hull.lower, torch.where(chosen < 0, hull.upper, hull.center))


def scores(network: Network, optimised: Optimised, lower: Tensor, upper: Tensor, row: Tensor, point: Tensor) -> Tensor:
    """(D, N) score of each neuron: by how much its relaxation lowers the bound at most, plus at the bound's minimiser;
    -inf for stable neurons.

    Args:
        lower, upper: (D, N) bounds of the neurons' inputs.
        row: (D,) the row of each subproblem whose bound is to be improved; point: (D, *shape), its minimiser.
    """
    neurons = Neurons.of(network)
    if not neurons.places:
        return lower
    each = torch.arange(len(row), device=row.device)
    forms = torch.cat([optimised.forms[place][each, row].flatten(1) for place in neurons.places], -1)
    values = network.values(point)
    inputs = torch.cat([values[network.operations[place].inputs[0]].flatten(1) for place in neurons.places], -1)
    outputs = torch.cat([values[place].flatten(1) for place in neurons.places], -1)
    unstable = (lower < 0) & (upper > 0)
    width = torch.where(unstable, upper - lower, 1.0)
    kinks = torch.cat([
        torch.full((shape.numel(),), network.nonlinear_at(place).kink, dtype=lower.dtype)
        for place, shape in zip(neurons.places, neurons.shapes, strict=True)
    ]).to(lower.device)  # fmt: skip
    intercept = (1 - kinks) * -lower * upper / width
    slope = (upper - kinks * lower) / width
    over = slope * inputs + intercept - outputs  # the upper line above the function, at the minimiser
    alphas = optimised.alphas[each, row]
    under = outputs - torch.where(unstable, alphas, 1.0) * inputs
    here = torch.where(forms < 0, -forms * over, forms * under.clamp(min=0))
    worst = -forms.clamp(max=0) * intercept
    return torch.where(unstable, worst + here.clamp(min=0), -torch.inf)
