"""The first affine layer over a set that is not a box: each output is a linear form, bounded by ``concretise``.

Later layers use intervals as usual. An output of a convolution depends on one patch of the image, and the set's
projection to a patch is a set of the same kind or lies in one, so forms are concretised patch by patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interval import Interval
from .network import Network
from .operations import Affine, Dense, Input, UnsupportedOperation
from .region import Region


def first_layer(network: Network, operation: Affine, region: Region, hull: Interval) -> Interval:
    """Tight bounds of the operation's outputs over ``region``.

    Args:
        hull: the box of the operation's input.
    Raises:
        UnsupportedOperation: the input does not have the image's shape, or the set has no projection to patches.
    """
    images = region.images
    scale, shift = _input_map(network, operation.inputs[0], images)
    dense = isinstance(operation, Dense)
    kept = scale.numel() == images[:1].numel() if dense else scale.shape[1:] == images.shape[1:]
    if not kept and len(images):
        name = "Linear" if dense else f"Conv{operation.weight.ndim - 2}d"
        raise UnsupportedOperation(
            f"{name} at {operation.path!r} as the first layer over {region.kind}: "
            f"found an input of shape {tuple(scale.shape[1:])}; accepted: the image's own, {tuple(images.shape[1:])}"
        )
    return operation.over_set(region, hull, scale, shift)


def _input_map(network: Network, position: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) of the elementwise map from the image to ``position``, each (1, *shape there)."""

    def evaluate(position: int, value: Tensor) -> Tensor:
        operation = network.operations[position]
        if isinstance(operation, Input):
            return value
        return operation(*(evaluate(read, value) for read in operation.inputs))

    shift = evaluate(position, torch.zeros_like(images[:1]))
    return evaluate(position, torch.ones_like(images[:1])) - shift, shift
