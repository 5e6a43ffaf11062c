"""Shi et al.'s initialisation for training with interval bounds (arXiv 2103.17268)."""

import math

import torch
from torch import nn

from ..bounds.operations import Affine, BatchNorm, Entrywise, Sum
from ..bounds.tracing import trace


@torch.no_grad()
def initialise_for_ibp(model: nn.Module, shape: torch.Size | None = None) -> None:
    """Draw every linear and convolutional weight but the last layer's from N(0, 2π / fan_in²).

    Then E|w| · fan_in / 2 = 1: a layer with its ReLU keeps the width of boxes constant, which grows
    exponentially under the usual initialisations. A residual sum adds up the widths of two boxes, so the weights of a
    layer that reads one (perhaps through batch norm and activation) are halved, as in the authors' code. Biases, batch
    norms and the last layer otherwise keep torch's defaults. Uses the global generator.

    Args:
        shape: of one image, for models whose forward reads sizes.
    Raises:
        UnsupportedOperation: the model has an operation that cannot be bounded.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    for layer in layers[:-1]:
        layer.weight.normal_(std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
    for layer in fed_by_sums(model, shape):
        layer.weight.mul_(0.5)


def fed_by_sums(model: nn.Module, shape: torch.Size | None = None) -> list[nn.Linear | nn.Conv1d | nn.Conv2d]:
    """The affine layers whose input is a sum of two branches, perhaps behind batch norms and activations; each once."""
    operations = trace(model, shape).operations
    found: dict[nn.Linear | nn.Conv1d | nn.Conv2d, None] = {}
    for operation in operations:
        if not isinstance(operation, Affine) or not isinstance(operation.layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            continue
        source = operations[operation.inputs[0]]
        while isinstance(source, (BatchNorm, Entrywise)):
            source = operations[source.inputs[0]]
        if isinstance(source, Sum):
            found[operation.layer] = None
    return list(found)
