"""The base of plain convolutional and fully connected networks: convolutions, then linear layers, in sequence."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import nn

from ..errors import InputError
from .base import Architecture


@dataclass(frozen=True)
class ConvolutionPlan:
    """A square convolution: its output channels and geometry."""

    features: int
    kernel: int
    stride: int = 1
    padding: int = 0

    def side(self, side: int) -> int:
        """The output's side in pixels, for an input of ``side`` pixels."""
        return (side + 2 * self.padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class FeedForward(Architecture):
    """Convolutions, Flatten, linear layers; each but the last with an activation, and with batch norm if asked for."""

    @abstractmethod
    def plan(self, height: int, width: int) -> tuple[list[ConvolutionPlan], list[int], bool]:
        """The convolutions, the features of the hidden linear layers, and whether each is followed by batch norm, for
        images of this size.

        Raises:
            InputError: the architecture is not published for such images.
        """

    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        channels, height, width = shape
        convolutions, hidden, norms = self.plan(height, width)
        layers: list[nn.Module] = []
        for conv in convolutions:
            layer = nn.Conv2d(channels, conv.features, conv.kernel, conv.stride, conv.padding)
            layers += self.hidden_layer(layer, norms)
            channels = conv.features
        flat = channels * _after(convolutions, height) * _after(convolutions, width)
        if not flat:
            smallest = next(side for side in range(1, 1000) if _after(convolutions, side))
            raise InputError(
                f"model.type {type(self).__name__}: found images of {height}×{width}; "
                f"accepted: {smallest}×{smallest} or larger"
            )
        layers.append(nn.Flatten())
        for features in hidden:
            layers += self.hidden_layer(nn.Linear(flat, features), norms)
            flat = features
        return [*layers, nn.Linear(flat, classes)]


def _after(convolutions: list[ConvolutionPlan], side: int) -> int:
    """The side in pixels after the convolutions; 0 where no pixels are left."""
    for convolution in convolutions:
        side = max(0, convolution.side(side))
    return side
