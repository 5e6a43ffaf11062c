"""The folded network, which is certified, as a module of plain layers for the exporter.

Normalisations become convolutions: alpha-beta-CROWN crashes on Sub/Div in front of convolutions when an image needs
branch and bound.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..bounds import Network


class PlainNetwork(nn.Module):
    """A folded network's operations as layers with the same weights, bit for bit."""

    def __init__(self, network: Network):
        super().__init__()
        self.inputs = [operation.inputs for operation in network.operations[1:]]
        self.layers = nn.ModuleList(
            operation.module(network.shapes[operation.inputs[0]]) for operation in network.operations[1:]
        )
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        values = [images]
        for layer, inputs in zip(self.layers, self.inputs, strict=True):
            values.append(layer(*(values[read] for read in inputs)))
        return values[-1]
