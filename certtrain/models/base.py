"""The base of architectures: frozen dataclasses that build an ``nn.Module`` for images of a given shape."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import Component
from ..errors import InputError, check


class Normalise(nn.Module):
    """(x - mean) / std per channel: a model's first layer, so that epsilon is in pixel units of [0, 1].

    Args:
        mean, std: one number per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "gelu": nn.GELU,
    "silu": nn.SiLU, "softplus": nn.Softplus,
}  # fmt: skip
"""torch's defaults: slope 0.01 for leaky_relu, GELU by the error function, softplus log(1 + exp(x))."""


@dataclass(frozen=True)
class Architecture(Component):
    """A network by name. Its model maps images (N, C, H, W) in [0, 1] to logits (N, classes).

    Args:
        mean, std: per channel, for the normalisation in the first layer; empty for none.
        activation: applied after every hidden layer.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    activation: Literal["relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "softplus"] = "relu"

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            bytes_ = [value for value in values if value > 1]
            meant = ", ".join(f"{value:g}/255" for value in values)
            check(not bytes_, name, values, f"numbers up to 1, for images in [0, 1]; did you mean {meant}?")
        check(len(self.mean) == len(self.std), "mean", self.mean, f"as many numbers as std, {len(self.std)}")
        check(all(value > 0 for value in self.std), "std", self.std, "numbers > 0")
        check(self.activation in ACTIVATIONS, "activation", self.activation, ", ".join(ACTIVATIONS))

    @abstractmethod
    def layers(self, shape: tuple[int, int, int], classes: int) -> list[nn.Module]:
        """The layers after normalisation for images of ``shape`` (C, H, W)."""

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Build a model with torch's default initialisation, drawn from the global generator.

        Raises:
            InputError: the architecture does not take such images; fewer than two classes.
        """
        check(classes >= 2, "classes", classes, "two or more")
        if len(self.mean) not in (0, 1, shape[0]):
            raise InputError(f"model.mean: found {len(self.mean)} numbers; accepted: {shape[0]}, one per channel")
        channels, height, width = shape
        normalise = [Normalise(self.mean, self.std)] if self.mean else []
        return nn.Sequential(*normalise, *self.layers((channels, height, width), classes))

    def hidden_layer(self, layer: nn.Linear | nn.Conv2d, batch_norm: bool) -> list[nn.Module]:
        """The layer, a batch norm if asked for, and the activation."""
        norm = (
            nn.BatchNorm1d(layer.out_features) if isinstance(layer, nn.Linear) else nn.BatchNorm2d(layer.out_channels)
        )
        return [layer, *([norm] if batch_norm else []), ACTIVATIONS[self.activation]()]
