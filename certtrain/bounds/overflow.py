"""Check whether a network's evaluation over a region can overflow; if so, no bound proves anything.

Later operations can hide an infinity, tanh(inf) = 1 and relu(-inf) = 0, and where it appears depends on the order of a
sum. So the check uses magnitudes |W| |x| + |b|, which no partial sum exceeds in any order.
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
"""Divisor of a format's largest number: a margin for roundings, and for differences of two ends' sums."""


def fits(network: Network, region: Region, bounds: Mapping[int, Bounds]) -> Tensor:
    """(B,) bool: whether the evaluation on the whole region, partial sums included, and interval bounds stay finite.

    The format is float32 with the rounding ``FLOAT32``, else the weights' dtype. Always True for networks with opaque
    operations, which have no bounds.

    Args:
        bounds: known bounds of non-linear operations' inputs.
    """
    hull = region.hull
    everything = torch.ones(len(hull.center), dtype=torch.bool, device=hull.center.device)
    if any(isinstance(operation, Opaque) for operation in network.operations):
        return everything
    most = torch.finfo(torch.float32 if network.rounding == FLOAT32 else hull.center.dtype).max / SPARE
    sizes = [(hull.center.abs() + hull.radius).amax(0, keepdim=True)]
    for operation in network.operations[1:]:
        sizes.append(operation.peak(*(sizes[read] for read in operation.inputs)))
    partial = any(operation.partial for operation in network.operations)
    if not partial and all(bool((size <= most).all()) for size in sizes):  # cheap sufficient check: all images at once
        return everything
    intervals = all_intervals(network, region, bounds)
    for number, operation in enumerate(network.operations[1:], start=1):
        ends = [intervals[read].center.abs() + intervals[read].radius for read in operation.inputs]
        for size in (*ends, operation.peak(*ends), intervals[number].center.abs() + intervals[number].radius):
            everything = everything & (size <= most).flatten(1).all(1)  # NaN is not
    return everything
