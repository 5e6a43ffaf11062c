"""Small networks whose counterexample is known by construction, and twins that are robust by construction.

On the box around the image, margin(x) = base(x) - sum of height_k · spike_k(x). The base is a random network whose
margin is at least FLOOR there: its linear bounds say so, and a bias sees to it. The spikes, made of ReLUs, are
max(0, 1 - |x - p_k|_1 / width): disjoint, flat elsewhere and mostly tiny, so that few gradients lead to them. The first
spike of a planted network turns the margin at p_1 to -DEPTH or less. In its twin every spike is lower than FLOOR, but
where there are several they are higher together: a bound that does not see that they are disjoint fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from networks import Residual
from torch import Tensor, nn

from certtrain.bounds import LinfBall
from certtrain.bounds.crown import backward, interval_bounds, relax_all
from certtrain.bounds.folding import fold

FLOOR = 0.25
"""The margin's lower bound without spikes."""

DEPTH = 0.05
"""How far below 0 the margin is at a planted counterexample, at least: half a million roundings of float32 at 1."""

KINDS = ("dense", "leaky", "conv", "residual", "max_pool")


@dataclass(frozen=True)
class Planted:
    """A robustness problem whose answer is known.

    Args:
        model: float32, in evaluation mode; maps (B, *image.shape) to (B, K).
        image: (*shape) in [0, 1]; label: its class; epsilon: the l-infinity radius.
        counterexample: (*shape) in the ball, exactly the same in float32 and float64; None if the network is robust,
            with a margin of at least a fifth of FLOOR.
        kind: of ``KINDS``.
    """

    model: nn.Module
    image: Tensor
    label: int
    epsilon: float
    counterexample: Tensor | None
    kind: str


class Spiked(nn.Module):
    """base(x) + spikes(x)."""

    def __init__(self, base: nn.Module, spikes: nn.Module):
        super().__init__()
        self.base, self.spikes = base, spikes

    def forward(self, x):
        return self.base(x) + self.spikes(x)


def planted_pairs(count: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[Planted, Planted]]:
    """``count`` planted networks, each with its robust twin; the kinds take turns. A case depends on its seed alone."""
    for number in range(count):
        yield planted_pair(seed + number, kinds[number % len(kinds)])


@torch.no_grad()
def planted_pair(seed: int, kind: str = "dense") -> tuple[Planted, Planted]:
    """A planted network and its robust twin, by seed. At most 8 inputs and 30 ReLUs where ``kind`` is dense."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    spatial = kind in ("conv", "residual", "max_pool")
    shape = torch.Size((1, 3, 3) if spatial else (1, 1, whole(2, 8)))
    classes, slope = whole(2, 4), 0.1 if kind == "leaky" else 0.0
    epsilon = number(0.05, 0.3)
    image = torch.rand(shape, generator=draw)
    lower, upper = ((image + side * epsilon).clamp(0, 1) for side in (-1, 1))
    tips, width = _places(draw, lower, upper, count=2 if shape.numel() <= 4 else 1 + whole(0, 1) * spatial)

    label, other = torch.randperm(classes, generator=draw)[:2].tolist()
    base = random_network(kind, shape, classes, draw, number(0.2, 3.0))
    _raise_to_floor(base, label, classes, image, epsilon)
    at_tip = base.double()(tips[:1].reshape(1, *shape).double())[0]
    base.float()
    tall = float(at_tip[label] - at_tip[other]) + DEPTH * 100 ** number(0, 1)
    low = [number(0.6, 0.8) * FLOOR for _ in tips]
    target = -torch.eye(classes)[label] if classes == 2 else torch.eye(classes)[other]

    def problem(heights: list[float], counterexample: Tensor | None) -> Planted:
        spikes = _spikes(tips, width, heights, target, slope)
        model = Spiked(base, spikes) if kind != "dense" else _beside(base, spikes)
        return Planted(model.eval(), image, label, epsilon, counterexample, kind)

    return problem([tall, *low[1:]], tips[0].reshape(shape)), problem(low, None)


def _places(draw: torch.Generator, lower: Tensor, upper: Tensor, count: int) -> tuple[Tensor, float]:
    """Tips (count, D) well inside the box, and a width that keeps their supports apart: from tiny to the box's own."""
    low, high = lower.flatten(), upper.flatten()
    tips = low + (high - low) * (0.1 + 0.8 * torch.rand(count, len(low), generator=draw))
    widest = float((high - low).sum()) * 0.02 * 50 ** float(torch.rand((), generator=draw))
    return tips, min([widest, *(0.49 * float((a - tips[0]).abs().sum()) for a in tips[1:])])


def _random(layer: nn.Linear | nn.Conv2d, draw: torch.Generator, gain: float = 1.0) -> nn.Module:
    """Weights from the generator alone: of unit variance over the fan-in, times ``gain``."""
    assert layer.bias is not None
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw) * gain / layer.weight[0].numel() ** 0.5)
    layer.bias.copy_(torch.randn(layer.bias.shape, generator=draw) * 0.1)
    return layer


def random_network(kind: str, shape: torch.Size, classes: int, draw: torch.Generator, gain: float) -> nn.Module:
    """A random network (B, *shape) → (B, classes) of one of ``KINDS``; to be called under ``torch.no_grad``."""
    size = shape.numel()
    if kind in ("dense", "leaky"):
        activation = nn.ReLU if kind == "dense" else lambda: nn.LeakyReLU(0.1)
        first, second = (_random(nn.Linear(n, 4), draw) for n in (size, 4))
        return nn.Sequential(
            nn.Flatten(), first, activation(), second, activation(), _random(nn.Linear(4, classes), draw, gain)
        )
    body: list[nn.Module] = [_random(nn.Conv2d(1, 2, 3, padding=1), draw), nn.ReLU()]
    if kind == "residual":
        inner = nn.Sequential(_random(nn.Conv2d(2, 2, 3, padding=1), draw), nn.ReLU())
        body.append(Residual(inner, -1 if float(torch.rand((), generator=draw)) < 0.5 else 1))
    if kind == "max_pool":
        body.append(nn.MaxPool2d(2, stride=1))
    features = 2 * (4 if kind == "max_pool" else size)
    return nn.Sequential(*body, nn.Flatten(), _random(nn.Linear(features, classes), draw, gain))


def _raise_to_floor(base: nn.Module, label: int, classes: int, image: Tensor, epsilon: float) -> None:
    """Shift the label's bias so that the margin's bound from interval bounds of the neurons is FLOOR."""
    network = fold(base, image.shape, dtype=torch.float64)
    region = LinfBall(epsilon).region(image[None].double())
    rows = torch.eye(classes, dtype=torch.float64)[label] - torch.eye(classes, dtype=torch.float64)
    rows = rows[[j for j in range(classes) if j != label]]
    lines = relax_all(network, interval_bounds(network, region))
    lowest = backward(network, len(network.operations) - 1, rows[None], lines).lower(region).min()
    last = list(base.modules())[-1]
    last.bias[label] += FLOOR - float(lowest) + 1e-4  # 1e-4: the bias is rounded to float32


def _spikes(tips: Tensor, width: float, heights: list[float], target: Tensor, slope: float) -> nn.Sequential:
    """(B, D) → (B, K): target · sum of height_k · max(0, 1 - |x - tip_k|_1 / width), of ReLUs or LeakyReLUs.

    LeakyReLUs in pairs do the same: f(t) + f(-t) = (1 - slope) |t|, and f(t) + slope f(-t) = (1 - slope²) max(0, t).
    """
    count, size = tips.shape
    around = nn.Linear(size, 2 * count * size)
    around.weight.copy_(torch.cat([torch.eye(size), -torch.eye(size)]).repeat(count, 1))
    around.bias.copy_(torch.cat([-tips, tips], 1).flatten())
    signs = (1.0,) if slope == 0 else (1.0, -1.0)
    rise = nn.Linear(2 * count * size, len(signs) * count)
    each = torch.eye(count).repeat_interleave(2 * size, 1) / (width * (1 - slope))
    rise.weight.copy_(torch.cat([-sign * each for sign in signs]))
    rise.bias.copy_(torch.tensor(signs).repeat_interleave(count))
    fall = nn.Linear(len(signs) * count, len(target))
    shares = torch.cat([torch.tensor(heights) * share / (1 - slope**2) for share in (1.0, slope)[: len(signs)]])
    fall.weight.copy_(target[:, None] * shares)
    fall.bias.zero_()
    activation = nn.ReLU if slope == 0 else lambda: nn.LeakyReLU(slope)
    return nn.Sequential(nn.Flatten(), around, activation(), rise, activation(), fall)


def _beside(base: nn.Module, spikes: nn.Sequential) -> nn.Sequential:
    """Two dense networks of equal depth as one: blocks side by side, their outputs added."""
    assert isinstance(base, nn.Sequential)
    left, right = ([m for m in part if isinstance(m, nn.Linear)] for part in (base, spikes))
    layers: list[nn.Module] = [nn.Flatten()]
    for depth, (a, b) in enumerate(zip(left, right, strict=True)):
        last = depth == len(left) - 1
        weight = (
            torch.cat([a.weight, b.weight]) if depth == 0
            else torch.cat([a.weight, b.weight], 1) if last
            else torch.block_diag(a.weight, b.weight)
        )  # fmt: skip
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.copy_(weight)
        layer.bias.copy_(a.bias + b.bias if last else torch.cat([a.bias, b.bias]))
        layers += [layer] if last else [layer, nn.ReLU()]
    return nn.Sequential(*layers)
