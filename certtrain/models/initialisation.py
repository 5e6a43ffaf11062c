"""Shi et al.'s initialisation for training with interval bounds (arXiv 2103.17268)."""

import math

import torch
from torch import nn


@torch.no_grad()
def initialise_for_ibp(model: nn.Module) -> None:
    """Draw every linear and convolutional weight but the last layer's from N(0, 2π / fan_in²).

    Then E|w| · fan_in / 2 = 1: a layer with its ReLU keeps the width of boxes constant, where the usual
    initialisations let it explode. Biases, batch norms and the last layer keep torch's defaults. Uses the
    global generator.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers[:-1]:
        layer.weight.normal_(std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
