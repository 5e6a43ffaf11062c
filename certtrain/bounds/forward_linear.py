"""Linear bounds of a folded network, carried forward from its input: the cheap way where few inputs vary.

Every number of the network lies between two lines over the box (the forward mode of arXiv 2002.12920). Backward passes
make tighter bounds, one for each neuron; these cost as many columns as inputs vary, for all neurons together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .clock import done, look
from .interval import Bounds
from .network import Network
from .operations import Nonlinear, Sum
from .region import Region
from .relaxation import InputLines, Relaxation


def forward_bounds(network: Network, region: Region, given: Mapping[int, Bounds] | None = None) -> dict[int, Bounds]:
    """Bounds of every non-linear operation's input over boxes, as ``crown_bounds`` gives them, but looser.

    Args:
        given: other bounds, with which these are intersected.
    Raises:
        OutOfTime: by the clock, which is looked at before each operation.
    """
    lines = {0: _input(region)}
    intervals = {0: region.hull}
    found: dict[int, Bounds] = {}
    for number, operation in enumerate(network.operations[1:], start=1):
        numbers = lines[0].lower.shape[:2].numel() * network.shapes[number].numel()
        look(f"lines of {type(operation).__name__}", operation.work(numbers))
        relaxation: Relaxation | None = None
        if isinstance(operation, Nonlinear):
            ends = [lines[read].bounds().intersect(intervals[read].bounds()) for read in operation.inputs]
            if given and number in given:
                known = network.apart(number, given[number])
                ends = [own.intersect(other) for own, other in zip(ends, known, strict=True)]
            ends = [Bounds(x.lower, torch.maximum(x.lower, x.upper)) for x in ends]
            intervals |= {read: x.interval() for read, x in zip(operation.inputs, ends, strict=True)}
            found[number], relaxation = network.together(ends), operation.relax(*ends)
        lines[number] = operation.forward_lines([lines[read] for read in operation.inputs], relaxation)
        intervals[number] = operation.interval(*(intervals[read] for read in operation.inputs))
        if isinstance(operation, Sum) and operation.largest is not None:  # b + relu(a - b) forgets that b is b
            intervals[number] = intervals[number].as_largest(*(intervals[read] for read in operation.largest))
    done()
    return found


def _input(region: Region) -> InputLines:
    hull = region.hull
    radius = hull.radius.flatten(1)
    wide = (radius > 0).any(0).nonzero().flatten()
    slopes = radius.new_zeros(len(radius), len(wide) + 1, radius.shape[1])
    slopes[:, torch.arange(len(wide)), wide] = radius[:, wide]
    slopes[:, -1] = hull.center.flatten(1)
    lines = slopes.reshape(*slopes.shape[:2], *hull.center.shape[1:])
    return InputLines(lines, lines)
