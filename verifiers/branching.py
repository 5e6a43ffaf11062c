"""Which neuron to split: scores from a linear bound.

The upper line of a ReLU costs a bound |coefficient| · intercept at most (BaBSR's leading term, arXiv 1909.06588); at
the point where the bound is smallest it costs what the line differs from the function there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bounds import Region
from ..bounds.network import Network
from .optimise import Neurons, Optimised


def minimiser(found: Optimised, region: Region, row: Tensor) -> Tensor:
    """(D, *shape): where the linear bound of one row of each is smallest over the region's hull."""
    hull = region.hull
    chosen = found.bound.forms[torch.arange(len(row), device=row.device), row]
    return torch.where(chosen > 0, hull.lower, torch.where(chosen < 0, hull.upper, hull.center))


def scores(network: Network, found: Optimised, lower: Tensor, upper: Tensor, row: Tensor, point: Tensor) -> Tensor:
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
    kinks = torch.cat([
        torch.full((shape.numel(),), network.nonlinear_at(place).kink, dtype=lower.dtype)
        for place, shape in zip(neurons.places, neurons.shapes, strict=True)
    ]).to(lower.device)  # fmt: skip
    intercept = (1 - kinks) * -lower * upper / width
    slope = (upper - kinks * lower) / width
    over = slope * inputs + intercept - outputs  # the upper line above the function, at the minimiser
    alphas = found.alphas[each, row]
    under = outputs - torch.where(unstable, alphas, 1.0) * inputs
    here = torch.where(forms < 0, -forms * over, forms * under.clamp(min=0))
    worst = -forms.clamp(max=0) * intercept
    return torch.where(unstable, worst + here.clamp(min=0), -torch.inf)
