"""Ours against auto_LiRPA's numbers (tests/golden/make_bounds.py): the same where the relaxation is the same."""

import json
from functools import cache

import pytest
import torch
from golden.make_bounds import EPSILONS, FILE, NETWORKS, SHAPE, images, network, rows
from networks import points_inside
from torch import Tensor

from certtrain.bounds import LinfBall, compute_rows
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.verifiers.neurons import Neurons
from certtrain.verifiers.optimise import Subproblems, maximise, starting_slopes

CASES = [(name, size) for name in NETWORKS for size in EPSILONS]
EVERY = pytest.mark.parametrize(("name", "size"), CASES, ids=[f"{name}, {size}" for name, size in CASES])
SAME = ("mlp", "cnn", "residual")
"""Where our slopes are theirs. For LeakyReLU they compare the chord's slope with 1/2, we the areas; our max pool is
ReLUs."""


def golden(name: str, size: str) -> dict[str, Tensor]:
    found = json.loads(FILE.read_text())["lower bounds of all margins"][f"{name}, {size}"]
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in found.items()}


@cache
def ours(name: str, size: str) -> dict[str, Tensor]:
    model = network(name).requires_grad_(False)
    region, forms = LinfBall(EPSILONS[size]).region(images()), rows(model)
    folded = fold(model, torch.Size(SHAPE))
    linear, neurons = crown_bounds(folded, region), Neurons.of(folded)
    found = {
        "ibp": compute_rows(model, region, forms),
        "crown_ibp": bound_forms(folded, region, forms, interval_bounds(folded, region)),
        "crown": bound_forms(folded, region, forms, linear),
    }
    if folded.piecewise_linear:
        lower, upper = (neurons.together({p: getattr(b, end) for p, b in linear.items()}) for end in ("lower", "upper"))
        sub = Subproblems(region, forms, torch.zeros(forms.shape[:2], dtype=forms.dtype), lower, upper)
        found["alpha_crown"] = maximise(folded, sub, starting_slopes(lower, upper, forms.shape[1]), steps=20).best
    points = points_inside(model, region.hull)
    found["attacked"] = torch.stack([(forms @ model(p).unsqueeze(-1)).squeeze(-1) for p in points]).amin(0)
    return found


def test_the_cases_are_those_of_the_file():
    found = json.loads(FILE.read_text())["lower bounds of all margins"]
    assert list(found) == [f"{name}, {size}" for name, size in CASES]


@EVERY
def test_no_bound_is_above_an_attack(name, size):
    """Theirs neither: the file is of these very networks."""
    attacked = ours(name, size)["attacked"]
    for key, bound in [*ours(name, size).items(), *golden(name, size).items()]:
        assert (bound <= attacked + 1e-6).all(), key


@EVERY
def test_intervals_are_the_same(name, size):
    torch.testing.assert_close(ours(name, size)["ibp"], golden(name, size)["ibp"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("key", ["crown_ibp", "crown"])
@pytest.mark.parametrize("size", EPSILONS)
@pytest.mark.parametrize("name", SAME)
def test_linear_bounds_are_the_same(name, size, key):
    torch.testing.assert_close(ours(name, size)[key], golden(name, size)[key], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("key", ["crown_ibp", "crown"])
@pytest.mark.parametrize("size", EPSILONS)
def test_leaky_relu_is_tighter(size, key):
    """The smaller area is the better choice on average, and never much worse."""
    found, theirs = ours("leaky_relu", size), golden("leaky_relu", size)
    assert found[key].mean() >= theirs[key].mean() - 1e-9
    assert (found[key] >= theirs[key] - 0.01 * (found["attacked"] - theirs[key])).all()


@pytest.mark.parametrize("key", ["crown_ibp", "crown"])
@pytest.mark.parametrize("size", EPSILONS)
def test_sigmoid_and_tanh_are_close(size, key):
    """The same tangents; theirs come from a table, and are off by its steps."""
    torch.testing.assert_close(ours("smooth", size)[key], golden("smooth", size)[key], rtol=1e-4, atol=2e-4)


@EVERY
def test_optimised_slopes(name, size):
    """At least as tight as theirs, up to 2 % of what is left between their bound and an attack."""
    found, theirs = ours(name, size), golden(name, size)
    if name != "smooth":  # nothing to choose there: our tangents are fixed
        left = (found["attacked"] - theirs["alpha_crown"]).mean()
        assert (theirs["alpha_crown"] - found["alpha_crown"]).mean() <= 0.02 * left + 1e-6
        assert (found["alpha_crown"] >= found["crown"] - 1e-9).all()
