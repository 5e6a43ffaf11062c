"""Bounds of the neurons' inputs by linear bounds with slopes optimised for each of them (alpha-CROWN, arXiv
2011.13824), layer after layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bounds import Bounds, Region
from ..bounds.clock import OutOfTime
from ..bounds.effort import work_of
from ..bounds.interval import Interval
from ..bounds.network import Network
from .neuron_clipping import NeuronLines, scaled
from .neurons import Columns, Neurons
from .optimise import Subproblems, ascents_at_a_time, maximise, starting_slopes

STEPS = 5
"""Steps of each ascent. On a ResNet of VNN-COMP (``resnet_4b``) 5, 10 and 20 steps raise the worst margin from -1.94
to -1.47, -1.42 and -1.38."""


def tightened(
    network: Network, region: Region, bounds: Mapping[int, Bounds], columns: Columns, steps: int = STEPS,
    rate: float = 0.25, room: int = 0,
) -> tuple[dict[int, Bounds], list[NeuronLines]]:  # fmt: skip
    """``bounds`` of every non-linear operation's input, by position, tightened for the neurons in ``columns``; out of
    time, those of the layers so far are.

    Args:
        network: operations of several inputs keep their bounds.
        columns: of ``Neurons.of(network)``; an operation's padding comes after its neurons.
        room: bytes for linear bounds. They are kept of whole operations, from the last to the first.
    Returns:
        the bounds, and for each image its linear bounds (over boxes): none out of time, or without room for an
        operation.
    """
    neurons, found, inputs = Neurons.of(network), dict(bounds), network.shapes[0].numel()
    reals = torch.split(columns.real, list(columns.sizes), 1)
    counts = [int(real.sum(1).max()) if real.numel() else 0 for real in reals]  # without what is padding in all images
    each = 2 * inputs * region.hull.center.element_size() * len(columns.neurons)
    kept, lines = len(counts), list[_Lines]()
    while kept and sum(counts[kept - 1 :]) * each <= room:
        kept -= 1
    first_neuron = first = 0
    try:
        for number, (place, count) in enumerate(zip(neurons.places, counts, strict=True)):
            part = slice(first, first + count)
            local, real = columns.neurons[:, part] - first_neuron, columns.real[:, part]
            found[place], own = _tightened_at(network, region, found, place, local, real, steps, rate, number >= kept)
            if own is not None:
                lines.append(replace(own, columns=own.columns + first))
            first_neuron, first = first_neuron + neurons.sizes[number], first + columns.sizes[number]
    except OutOfTime:
        return found, []
    return found, [_of_image(lines, columns.real, region.hull, image) for image in range(len(region))] if lines else []


@dataclass(frozen=True, eq=False)
class _Lines:
    """Linear lower bounds of neurons' inputs, and of minus their inputs, over a region around B images.

    Args:
        below, above: (B, C, N) each; below_constants, above_constants: (B, C) each.
        columns: (C,) the neurons' columns.
    """

    below: Tensor
    above: Tensor
    below_constants: Tensor
    above_constants: Tensor
    columns: Tensor


def _of_image(lines: Sequence[_Lines], real: Tensor, hull: Interval, image: int) -> NeuronLines:
    columns = torch.cat([own.columns for own in lines])
    chosen = real[image, columns]
    forms, constants = (
        torch.cat([torch.cat([getattr(own, name)[image] for own in lines])[chosen] for name in names])
        for names in (("below", "above"), ("below_constants", "above_constants"))
    )
    box = Interval(hull.center[image], hull.radius[image])
    return NeuronLines(*scaled(forms, constants, box), columns[chosen])


def tightening_work(network: Network, bounds: Mapping[int, Bounds], steps: int = STEPS) -> Tensor:
    """(B,) float64, multiplications that ``tightened`` takes for each image; 0 where no neuron is unstable."""
    work = torch.zeros(len(bounds[network.nonlinear[0]].lower), dtype=torch.float64)
    for place in network.nonlinear[1:]:
        operation = network.nonlinear_at(place)
        if len(operation.inputs) == 1:
            (open_,) = operation.open(bounds[place])
            rows = 2 * open_.flatten(1).sum(1)
            work = work.to(rows.device) + rows * passes(steps) * work_of_a_row(network, operation.inputs[0])
    return work


def passes(steps: int) -> int:
    """Backward passes that an ascent costs: a gradient costs two."""
    return 3 * steps + 1


def work_of_a_row(network: Network, position: int) -> float:
    """Multiplications of one linear form's way from an operation's output to the input."""
    return sum(work_of(network, position, lambda number: network.shapes[number].numel()).values())


def _tightened_at(
    network: Network, region: Region, bounds: Mapping[int, Bounds], place: int, chosen: Tensor, real: Tensor,
    steps: int, rate: float, lines: bool,
) -> tuple[Bounds, _Lines | None]:  # fmt: skip
    """The bounds of one operation's input, tightened at its neurons ``chosen`` (B, M) where ``real``; and linear
    bounds of these, if ``lines``."""
    known, (read, *others) = bounds[place], network.operations[place].inputs
    if others:
        return known, None
    shape = network.shapes[read]
    lower, upper = known.lower.flatten(1).clone(), known.upper.flatten(1).clone()
    neurons = Neurons.of(network, read)
    low, up = neurons.ends(bounds, lower)
    columns = Columns.of(neurons, neurons.open(network, bounds, lower))
    exact = not columns.real.shape[1]  # the operation reads a linear function of the inputs
    if not chosen.shape[1] or (exact and not lines):
        return known, None
    found = list[Sequence[Tensor]]()
    size = max(1, ascents_at_a_time(network, 2 * len(chosen), lower, read))
    for part, is_real in zip(torch.split(chosen, size, 1), torch.split(real, size, 1), strict=True):
        units = lower.new_zeros(*part.shape, lower.shape[1]).scatter_(2, part.unsqueeze(-1), 1.0)
        forms = torch.cat([units, -units], 1).reshape(len(part), -1, *shape)
        sub = Subproblems(region, forms, forms.new_zeros(forms.shape[:2]), low, up, position=read)
        slopes = columns.gathered(starting_slopes(low, up, forms.shape[1]), 0.0)
        ascent = maximise(network, sub, slopes, columns=columns, steps=0 if exact else steps, rate=rate)
        count = part.shape[1]
        if lines:
            flat, constants = ascent.forms.flatten(2), ascent.constants
            found.append((flat[:, :count], flat[:, count:], constants[:, :count], constants[:, count:]))
        below, above = (torch.where(is_real, end, -math.inf) for end in torch.split(ascent.best, count, 1))
        lower.scatter_reduce_(1, part, below, "amax")
        upper.scatter_reduce_(1, part, -above, "amin")
    tighter = Bounds(lower.reshape(known.lower.shape), upper.reshape(known.upper.shape)).uncrossed()
    if not lines:
        return tighter, None
    below, above, below_constants, above_constants = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    every = torch.arange(chosen.shape[1], device=chosen.device)
    return tighter, _Lines(below, above, below_constants, above_constants, every)
