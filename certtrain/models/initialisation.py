"""Initialisations: Shi et al.'s for training with interval bounds (arXiv 2103.17268), residual branches of 0, and He
et al.'s as released networks draw it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..bounds.operations import Affine, BatchNorm, Dropout, Entrywise, Operation, Rearrangement, Sum
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


@torch.no_grad()
def zero_branches(model: nn.Module, shape: torch.Size | None = None) -> None:
    """Set the last layer of every residual branch, weight and bias, to 0: each block begins as the identity.

    A branch behind a norm widens boxes by a factor that no scale of its weights changes, and the factors of all blocks
    multiply: from Shi et al.'s weights alone such nets learn late, or not at all. Branches of 0 have no such factor;
    training lets them grow as far as the loss allows (``docs/training.md`` has figures). Fixup (arXiv 1901.09321) and
    ReZero (arXiv 2003.04887) do so for signals.

    Args:
        shape: of one image, for models whose forward reads sizes.
    Raises:
        UnsupportedOperation: the model has an operation that cannot be bounded.
    """
    for layer in ends_of_branches(model, shape):
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()


Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d


def ends_of_branches(model: nn.Module, shape: torch.Size | None = None) -> list[Layer]:
    """The last layer with weights of each residual branch whose other summand is the block's own input; each once.

    It may be a batch norm. A branch that ends in an activation has none.
    """
    operations = trace(model, shape).operations
    before: list[set[int]] = []
    for operation in operations:
        before.append(set(operation.inputs).union(*(before[read] for read in operation.inputs)))
    found: dict[Layer, None] = {}
    for operation in operations:
        if not isinstance(operation, Sum):
            continue
        for branch, shortcut in (operation.inputs, operation.inputs[::-1]):
            layer = _last_layer(operations, branch) if shortcut in before[branch] else None
            if layer is not None:
                found[layer] = None
    return list(found)


def _last_layer(operations: tuple[Operation, ...], position: int) -> Layer | None:
    operation = operations[position]
    while isinstance(operation, (Rearrangement, Dropout)):
        operation = operations[operation.inputs[0]]
    if isinstance(operation, BatchNorm):
        return operation.norm if operation.norm.affine else None
    layer = operation.layer if isinstance(operation, Affine) else None
    return layer if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) else None


@dataclass(frozen=True)
class HeDraw:
    """How a released network draws its initial weights; what ``default`` names keeps torch's draw.

    Args:
        fan: a convolution's weights are drawn from N(0, 2 / n), n = kernel area · channels ``in`` or ``out``.
        linear: weights of linear layers: ``default``, ``normal`` N(0, 2 / features in), or ``zero``.
        zero_bias: whether biases are 0.
    """

    fan: Literal["in", "out"] = "out"
    linear: Literal["default", "normal", "zero"] = "default"
    zero_bias: bool = True


HE: dict[str, HeDraw] = {
    "he_fan_out": HeDraw(zero_bias=False),
    "he_fan_out_zero_bias": HeDraw(),
    "he_fan_out_linear": HeDraw(linear="normal"),
    "he_fan_in_zero_linear": HeDraw(fan="in", linear="zero"),
}
"""By name: torchvision's ResNets; the WideResNet of TRADES, ATTA, MART, AWP, GAIRAT, friendly training and HAT; the
PreAct-ResNet of GradAlign; the WideResNet of Fast-BAT."""


@torch.no_grad()
def initialise_he(model: nn.Module, draw: HeDraw) -> None:
    """Draw convolutions, and linear layers where ``draw`` says so (He et al., arXiv 1502.01852). Batch norms keep
    torch's weights of 1 and biases of 0. Uses the global generator."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            channels = module.out_channels if draw.fan == "out" else module.weight.shape[1]
            module.weight.normal_(std=math.sqrt(2 / (channels * math.prod(module.kernel_size))))
        elif isinstance(module, nn.Linear) and draw.linear == "normal":
            module.weight.normal_(std=math.sqrt(2 / module.in_features))
        elif isinstance(module, nn.Linear) and draw.linear == "zero":
            module.weight.zero_()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None and draw.zero_bias:
            module.bias.zero_()
