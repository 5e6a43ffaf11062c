"""Linear bounds of a folded network, carried forward from its input: cheap where few inputs vary.

Every number of the network lies between two linear functions over the box (the forward mode of arXiv 2002.12920). The
cost is one column per varying input for all neurons together. Backward passes are tighter, but take one per neuron.
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
    """Bounds of every non-linear operation's input over boxes, by position; looser than those of ``crown_bounds``.

    Args:
        given: other bounds to intersect with.
    Raises:
        OutOfTime: by the clock, which is checked before each operation.
    """
    lines = {0: _input_lines(region)}
    intervals = {0: region.hull}
    bounds: dict[int, Bounds] = {}
    for number, operation in enumerate(network.operations[1:], start=1):
        numbers = lines[0].lower.shape[:2].numel() * network.shapes[number].numel()
        look(f"lines of {type(operation).__name__}", operation.work(numbers))
        relaxation: Relaxation | None = None
        if isinstance(operation, Nonlinear):
            ends = [lines[read].bounds().intersect(intervals[read].bounds()) for read in operation.inputs]
            if given and number in given:
                known = network.split_bounds(number, given[number])
                ends = [own.intersect(other) for own, other in zip(ends, known, strict=True)]
            ends = [Bounds(x.lower, torch.maximum(x.lower, x.upper)) for x in ends]
            intervals |= {read: x.interval() for read, x in zip(operation.inputs, ends, strict=True)}
            bounds[number], relaxation = network.join_bounds(ends), operation.relax(*ends)
        lines[number] = operation.forward_lines([lines[read] for read in operation.inputs], relaxation)
        intervals[number] = operation.interval(*(intervals[read] for read in operation.inputs))
        if isinstance(operation, Sum) and operation.maximum_of is not None:  # b + relu(a - b) counts b twice
            parts = (intervals[read] for read in operation.maximum_of)
            intervals[number] = intervals[number].tightened_to_maximum(*parts)
    done()
    return bounds


def _input_lines(region: Region) -> InputLines:
    """The lines of the input itself, one column per input that varies in any box of the batch."""
    hull = region.hull
    radius = hull.radius.flatten(1)
    wide = (radius > 0).any(0).nonzero().flatten()
    slopes = radius.new_zeros(len(radius), len(wide) + 1, radius.shape[1])
    slopes[:, torch.arange(len(wide)), wide] = radius[:, wide]
    slopes[:, -1] = hull.center.flatten(1)
    lines = slopes.reshape(*slopes.shape[:2], *hull.center.shape[1:])
    return InputLines(lines, lines)
