"""Whether a network's evaluation over a region can leave its floating-point format: then no bound proves anything.

Infinity is swallowed by what comes after it, tanh(inf) = 1 and relu(-inf) = 0, and where it appears depends on the
order of a sum. So magnitudes |W| |x| + |b| are looked at, which no partial sum exceeds in any order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .crown import all_intervals
from .interval import Bounds
from .network import Network
from .operations import Opaque
from .region import Region
from .rounding import FLOAT32

SPARE = 4
"""What a format's largest number is divided by: for roundings, and for our differences of two ends' sums."""


def fits(network: Network, region: Region, bounds: Mapping[int, Bounds]) -> Tensor:
    """(B,) bool: every number of the network's evaluation, partial sums included, stays finite on the whole region,
    and so do interval bounds of it.

    The format is float32 with the rounding of float32, else that of the weights. True of what is not bounded at all.

    Args:
        bounds: of non-linear operations' inputs, as far as they are known.
    """
    hull = region.hull
    everything = torch.ones(len(hull.center), dtype=torch.bool, device=hull.center.device)
    if any(isinstance(operation, Opaque) for operation in network.operations):
        return everything
    most = torch.finfo(torch.float32 if network.rounding == FLOAT32 else hull.center.dtype).max / SPARE
    sizes = [(hull.center.abs() + hull.radius).amax(0, keepdim=True)]
    for operation in network.operations[1:]:
        sizes.append(operation.peak(*(sizes[read] for read in operation.inputs)))
    if all(bool((size <= most).all()) for size in sizes):  # for all images at once, as if nothing ever cancelled
        return everything
    intervals = all_intervals(network, region, bounds)
    for number, operation in enumerate(network.operations[1:], start=1):
        ends = [intervals[read].center.abs() + intervals[read].radius for read in operation.inputs]
        for size in (*ends, operation.peak(*ends), intervals[number].center.abs() + intervals[number].radius):
            everything = everything & (size <= most).flatten(1).all(1)  # NaN is not
    return everything
