"""The first affine layer over a set that is not a box: each output is a linear form, bounded by ``concretise``.

Later layers use intervals as usual. An output of a convolution depends on one patch of the image, and the set's
projection to a patch is a set of the same kind or lies in one, so forms are concretised patch by patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interval import Interval
from .network import Network
from .operations import Affine, Dense, Input, Operation, UnsupportedOperation
from .region import Region


def first_layer(network: Network, operation: Affine, region: Region, hull: Interval) -> Interval:
    """Tight bounds of the operation's outputs over ``region``.

    Args:
        hull: the box of the operation's input.
    Raises:
        UnsupportedOperation: the input does not have the image's shape, or the set has no projection to patches.
    """
    images, dense = region.images, isinstance(operation, Dense)
    scale, shift, shape = _input_map(network, operation.inputs[0], images)
    if not (shape.numel() == images.shape[1:].numel() if dense else shape == images.shape[1:]) and len(images):
        name = "Linear" if dense else f"Conv{operation.weight.ndim - 2}d"
        raise UnsupportedOperation(
            f"{name} at {operation.path!r} as the first layer over {region.kind}: "
            f"found an input of shape {tuple(shape)}; accepted: the image's own, {tuple(images.shape[1:])}"
        )
    return operation.over_set(region, hull, scale, shift)


def _input_map(network: Network, position: int, images: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """(scale, shift) of the elementwise map up to a position, each (1, *its shape), and that shape. If a step drops
    entries or repeats them, the shape that it leaves: a later one of the right size would hold others."""
    steps, ends = list[Operation](), [torch.zeros_like(images[:1]), torch.ones_like(images[:1])]
    while not isinstance(operation := network.operations[position], Input):
        steps.append(operation)
        (position,) = operation.inputs
    for step in reversed(steps):
        size = ends[0].numel()
        ends = [step(value) for value in ends]
        if ends[0].numel() != size:
            break
    shift, one = ends
    return one - shift, shift, shift.shape[1:]
