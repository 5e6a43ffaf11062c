"""Networks with planted counterexamples are what they say, and MILP and bounds agree."""

import pytest
import torch
from milp_oracle import minimum
from planted import DEPTH, FLOOR, KINDS, Planted, planted_pair, planted_pairs
from torch import nn

from certtrain.attacks import Pgd
from certtrain.bounds import LinfBall
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.noise import Noise
from certtrain.step import Batch, Step
from certtrain.verifiers import Specification


def margin(case: Planted, points: torch.Tensor) -> torch.Tensor:
    """(B,) in the points' dtype."""
    logits = case.model.to(points.dtype)(points)
    case.model.float()
    others = [j for j in range(logits.shape[1]) if j != case.label]
    return logits[:, case.label] - logits[:, others].amax(1)


def attacked(case: Planted) -> bool:
    """Whether the library's default attack finds a counterexample."""
    ball = LinfBall(case.epsilon)
    batch = Batch(case.image[None], torch.tensor([case.label]), torch.zeros(1, dtype=torch.int64))
    step = Step.evaluation(ball, Noise(0, batch.index))
    found = Pgd(steps=40, step_size=0.1, objective="margin")(case.model, batch, ball, step).images
    return bool(margin(case, found) <= 0)


@torch.no_grad()
def test_counterexamples_are_what_they_say_in_both_precisions():
    for case, twin in planted_pairs(100, seed=1000):
        assert case.counterexample is not None and twin.counterexample is None
        for dtype in (torch.float32, torch.float64):
            image, point = case.image[None].to(dtype), case.counterexample[None].to(dtype)
            assert LinfBall(case.epsilon).contains(image, point).all()
            assert float(margin(case, point)) <= -DEPTH + 1e-5
            assert float(margin(twin, point)) >= FLOOR / 5


def test_the_default_attack_misses_a_third_and_finds_some():
    found = [attacked(case) for case, _ in planted_pairs(60)]
    assert len(found) / 3 <= found.count(False) <= len(found) - 5


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_minimum_tells_planted_networks_from_their_twins(kind):
    missed_by_bounds = 0
    for pair in planted_pairs(4 if kind in ("residual", "max_pool") else 8, seed=500, kinds=(kind,)):
        for case in pair:
            network = fold(case.model, case.image.shape, dtype=torch.float64)
            region = LinfBall(case.epsilon).region(case.image[None].double())
            specification = Specification.robust(torch.tensor([case.label]), network.shapes[-1][0])
            rows, offsets = specification.rows.double(), specification.offsets.double()
            bounds = crown_bounds(network, region)
            exact = minimum(network, region, rows, offsets, bounds)
            assert exact.optimal.all()
            for found in (bounds, interval_bounds(network, region)):
                assert (bound_forms(network, region, rows, found)[0] <= exact.values + 1e-5).all()
            if case.counterexample is None:
                assert exact.bounds.min() >= FLOOR / 5 - 1e-5
                missed_by_bounds += int((bound_forms(network, region, rows, bounds) <= 0).any())
                continue
            worst = exact.points[exact.values.argmin()][None]
            assert exact.values.min() <= -DEPTH + 1e-5 and LinfBall(case.epsilon).contains(region.images, worst).all()
            assert margin(case, worst.float()) < 0
    assert missed_by_bounds > 0  # twins that need more than linear bounds


@torch.no_grad()
def test_a_case_depends_on_its_seed_alone():
    first, _ = planted_pair(7, "conv")
    torch.rand(100)
    second, _ = planted_pair(7, "conv")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert torch.equal(first.image, second.image) and first.epsilon == second.epsilon


def test_dense_networks_are_tiny():
    for case, _ in planted_pairs(60, kinds=("dense",)):
        network = fold(case.model, case.image.shape)
        assert case.image.numel() <= 8 and sum(network.shapes[place].numel() for place in network.nonlinear) <= 30
        assert all(isinstance(layer, (nn.Flatten, nn.Linear, nn.ReLU)) for layer in case.model.children())
