"""Small networks trained to hide counterexamples from gradients, as SoundnessBench does (arXiv 2412.03154).

Training has two objectives: at a planted point of each image's box another class wins, and at every point that gradient
descent has found lately the image's own class wins. It starts from random weights with one neuron for each
image that is active near its planted point only: near a corner of the box, as there, or (``inner``) well inside, where
no minimiser of a linear bound lies. No verifier may call such an image robust.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

WINDOW = 20
"""Number of training steps for which a point found by descent is trained on."""

DEPTH = 0.05
"""How far below 0 the margin is at a planted point, at least."""

KINDS = ("dense", "deep", "inner", "conv", "smooth")

WAYS = 5
"""Directions by which an inner planted point is told from others."""

WIDTH = 0.12
"""Mean distance along them at which it no longer is, in radii of the box."""


@dataclass(frozen=True)
class Hidden:
    """A robustness problem for each of B images, every one of which has a counterexample.

    Args:
        model: float32, in evaluation mode; maps (B, *shape) to (B, K).
        images: (B, *shape) in [0, 1]; labels: (B,); epsilon: the l-infinity radius.
        counterexamples: (B, *shape), where another class wins.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    epsilon: float
    counterexamples: Tensor


def hidden(kind: str, seed: int = 0, count: int = 3, steps: int = 80) -> Hidden:
    """A network of one of ``KINDS`` with ``count`` images, by seed, after ``steps`` steps of training."""
    draw = torch.Generator().manual_seed(1000 * seed + KINDS.index(kind))
    shape, classes, epsilon = {
        "dense": ((1, 1, 16), 3, 0.2), "deep": ((1, 1, 30), 4, 0.15), "conv": ((1, 5, 5), 3, 0.2),
        "smooth": ((1, 1, 6), 3, 0.3), "inner": ((1, 1, 16), 3, 0.2),
    }[kind]  # fmt: skip
    images = 0.3 + 0.4 * torch.rand(count, *shape, generator=draw)
    labels = torch.randint(classes, (1,), generator=draw).expand(count)  # others take ten times as long to learn
    target = (labels + 1) % classes
    sides = torch.randint(2, images.shape, generator=draw) * 2.0 - 1
    low, high = (0.2, 0.6) if kind == "inner" else (0.9, 1.0)
    planted = images + sides * epsilon * (low + (high - low) * torch.rand(images.shape, generator=draw))
    model = _network(kind, images, sides * epsilon, labels, target, planted, draw)
    adam, window = torch.optim.Adam(model.parameters(), lr=2e-3), list[Tensor]()
    for _ in range(steps):
        start = images + epsilon * (2 * torch.rand(8, *images.shape, generator=draw) - 1)
        window = [*window[1 - WINDOW :], descended(model, images, labels, epsilon, start.flatten(0, 1), 8)]
        near = torch.cat([images, *window])
        robust = (0.2 - margins(model, near, labels.repeat(len(near) // count))).clamp(min=0)
        logits = model(planted)
        wins = (logits.gather(1, target[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
        adam.zero_grad()
        (3 * count * robust.mean() + (0.2 - wins).clamp(min=0).sum()).backward()
        adam.step()
    return Hidden(model.eval(), images, labels, epsilon, planted)


def margins(model: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    """(B,) logits of the labels minus the largest others."""
    logits, own = model(points), labels.unsqueeze(1)
    return logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -torch.inf).amax(1)


def descended(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, points: Tensor, steps: int) -> Tensor:
    """(R * B, *shape): where sign steps from ``points`` (R * B, *shape) end."""
    repeats = len(points) // len(images)
    center, own = images.repeat(repeats, *[1] * (images.ndim - 1)), labels.repeat(repeats)
    for step in range(steps):
        with torch.enable_grad():
            at = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(margins(model, at, own).sum(), at)
        points = points - 0.5 * epsilon * 0.1 ** (step / steps) * gradient.sign()
        points = torch.minimum(torch.maximum(points, center - epsilon), center + epsilon)
    return points.detach()


@torch.no_grad()
def _network(
    kind: str, images: Tensor, way: Tensor, labels: Tensor, target: Tensor, planted: Tensor, draw: torch.Generator
) -> nn.Sequential:
    """Random weights, and in each hidden layer one neuron for each image that is active near its planted point only;
    ``way`` (B, *shape) is the way from the images to the corners of their boxes near the planted points."""
    count, size, classes = len(images), images[0].numel(), 3 + (kind == "deep")
    front, channels = list[nn.Module](), 1
    if kind == "conv":
        channels = 4
        front = [nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()]
    sizes = [channels * size, *{"deep": (32, 32, 32), "inner": (48, 16), "conv": (24,)}.get(kind, (32, 32)), classes]
    linear = [nn.Linear(*ends) for ends in pairwise(sizes)]
    activation = nn.Tanh if kind == "smooth" else nn.ReLU
    body = [module for layer in linear for module in (activation(), layer)][1:]
    model = nn.Sequential(*front, nn.Flatten(), *body)
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            scale = 0.5 * (2 / layer.weight[0].numel()) ** 0.5
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw) * scale)
            layer.bias.zero_()
    if kind == "conv":  # its first channel hands the pixels on
        front[0].weight[0] = torch.eye(9)[4].reshape(1, 3, 3)
    if kind == "inner":
        _tell_apart_inside(linear, planted.flatten(1), float(way.abs().max()), draw)
    else:
        _tell_apart_at_corners(linear, images.flatten(1), way.flatten(1))
    for layer in linear[-2:0:-1] if kind != "inner" else []:
        layer.weight[:count] = 0
        layer.weight[:count, :count] = torch.eye(count)
    linear[-1].weight[:, :count] = 0
    linear[-1].bias[:] = 0.3 * torch.eye(classes)[labels[0]]
    here = margins(model, planted, labels)
    strength = (here + 0.4) / (0.7 if kind == "smooth" else 1.5)  # about what the neuron is there
    for number in range(count):
        linear[-1].weight[target[number], number] += strength[number] / 2
        linear[-1].weight[labels[number], number] -= strength[number] / 2
    return model


def _tell_apart_at_corners(linear: list[nn.Linear], images: Tensor, way: Tensor) -> None:
    """Make the first neurons 20 t - 17 of the share t of the way from an image to its corner."""
    count, size = images.shape
    linear[0].weight[:count] = 0
    linear[0].weight[:count, :size] = 20 * way / (way**2).sum(1, keepdim=True)
    linear[0].bias[:count] = -(linear[0].weight[:count, :size] * images).sum(1) - 17


def _tell_apart_inside(linear: list[nn.Linear], planted: Tensor, epsilon: float, draw: torch.Generator) -> None:
    """Make the second layer's first neurons 2 - sum |<way, x - planted>| / width over random ways, of ReLUs."""
    count, size = planted.shape
    ways = torch.randn(count, WAYS, size, generator=draw) / size**0.5
    for number in range(count):
        first = 2 * WAYS * number
        rows = torch.cat([ways[number], -ways[number]])
        linear[0].weight[first : first + 2 * WAYS] = rows
        linear[0].bias[first : first + 2 * WAYS] = -rows @ planted[number]
        linear[1].weight[number] = 0
        linear[1].weight[number, first : first + 2 * WAYS] = -2 / (WAYS * WIDTH * epsilon)
        linear[1].bias[number] = 2
