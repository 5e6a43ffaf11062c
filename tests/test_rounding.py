"""Bounds that rounding cannot break: against rational arithmetic, and against many orders of float32 evaluation."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from evaluation import cancelling, exactly, in_some_order
from torch import nn

from certtrain.bounds import LinfBall, UnsupportedOperation, compute_rows
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds, interval_forms
from certtrain.bounds.folding import fold
from certtrain.bounds.rounding import FLOAT32, REAL, check

BOUNDS = pytest.mark.parametrize("bounds_of", [interval_bounds, crown_bounds], ids=["crown-ibp", "crown"])


def dense(seed, widths=(4, 7, 6, 3), scale=1.0, slope=0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(slope) if slope else nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.requires_grad_(False)


def rows_for(labels, classes) -> torch.Tensor:
    rows = torch.eye(classes, dtype=torch.float64)[labels].unsqueeze(1) - torch.eye(classes, dtype=torch.float64)
    return rows


@BOUNDS
@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
@pytest.mark.parametrize("seed", range(3))
def test_real_holds_in_rational_arithmetic(seed, scale, slope, bounds_of):
    network = replace(fold(dense(seed, scale=scale, slope=slope), (4,), dtype=torch.float64), rounding=REAL)
    torch.manual_seed(seed + 100)
    images, epsilon = torch.rand(3, 4, dtype=torch.float64), 0.1
    region, rows = LinfBall(epsilon).region(images), rows_for(torch.tensor([0, 1, 2]), 3)
    bounds = bounds_of(network, region)
    lower = torch.maximum(bound_forms(network, region, rows, bounds), interval_forms(network, region, rows))
    generator = np.random.default_rng(seed)
    for image in range(3):
        for trial in range(40):
            signs = generator.choice([-1, 1], 4) if trial % 2 else generator.uniform(-1, 1, 4)
            point = [
                min(max(Fraction(v) + Fraction(float(s)) * Fraction(epsilon), Fraction(0)), Fraction(1))
                for v, s in zip(images[image].tolist(), signs)
            ]
            seen, logits = exactly(network, point)
            for number, values in seen.items():
                low, up = bounds[number].lower[image].tolist(), bounds[number].upper[image].tolist()
                assert all(Fraction(a) <= v <= Fraction(b) for a, v, b in zip(low, values, up))
            for row, bound in zip(rows[image].tolist(), lower[image].tolist()):
                assert sum(Fraction(r) * z for r, z in zip(row, logits)) >= Fraction(bound)


@BOUNDS
@pytest.mark.parametrize("kind", ["dense", "leaky", "convolution"])
def test_float32_holds_for_every_order_of_evaluation(kind, bounds_of):
    torch.manual_seed(1)
    shape, models = (1, 6, 6), {
        "dense": nn.Sequential(nn.Flatten(), *dense(0, (36, 30, 20, 3), 3.0)),
        "leaky": nn.Sequential(nn.Flatten(), *dense(1, (36, 30, 20, 3), 3.0, 0.125)),
        "convolution": nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        ),
    }  # fmt: skip
    model = models[kind].eval().requires_grad_(False)
    network = replace(fold(model, shape, dtype=torch.float64), rounding=FLOAT32)
    images = torch.rand(2, *shape)
    for epsilon in (0.0, 0.01):
        region, rows = LinfBall(epsilon).region(images.double()), rows_for(torch.tensor([0, 1]), 3)
        lower = bound_forms(network, region, rows, bounds_of(network, region))
        lower = torch.maximum(lower, interval_forms(network, region, rows))
        generator = np.random.default_rng(0)
        for image in range(2):
            for _ in range(40):
                noise = generator.choice([-1, 0, 1], shape) * epsilon
                point = np.clip(images[image].numpy().astype(np.float64) + noise, 0, 1)
                inside = np.float32(point)  # towards the image, where rounding led out of the box
                inside = np.where(np.abs(inside.astype(np.float64) - point) > 0, images[image].numpy(), inside)
                logits = in_some_order(network, inside.astype(np.float32), generator).astype(np.float64)
                assert (rows[image].numpy() @ logits >= lower[image].numpy()).all()


def test_a_net_that_round_to_nearest_certifies_wrongly():
    model, x = cancelling(), torch.tensor([[1.0, 1.0]])
    network = fold(model, (2,), dtype=torch.float64)
    region, rows = LinfBall(0.0).region(x.double()), torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)
    _, logits = exactly(network, [Fraction(1), Fraction(1)])
    assert logits[0] - logits[1] < 0  # the truth: misclassified
    assert model(x)[0].argmax() == 0 and compute_rows(model, LinfBall(0.0).region(x), rows.float()) > 0
    assert interval_forms(network, region, rows) > 0
    for rounding in (REAL, FLOAT32):
        careful = replace(network, rounding=rounding)
        assert not interval_forms(careful, region, rows) > 0
        assert not bound_forms(careful, region, rows, crown_bounds(careful, region)) > 0


def test_real_costs_next_to_nothing():
    network = fold(dense(0), (4,), dtype=torch.float64)
    region, rows = LinfBall(0.05).region(torch.rand(5, 4, dtype=torch.float64)), rows_for(torch.arange(5) % 3, 3)
    careful = replace(network, rounding=REAL)
    plain = bound_forms(network, region, rows, crown_bounds(network, region))
    found = bound_forms(careful, region, rows, crown_bounds(careful, region))
    assert (found <= plain).all() and (plain - found).max() < 1e-10


def test_other_activations_are_refused_by_name():
    with pytest.raises(UnsupportedOperation, match="tanh"):
        check(fold(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), (2,)))
