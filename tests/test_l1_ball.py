"""The l1 ball beyond the contract of every perturbation set (tests/test_perturbation.py): against scipy."""

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog, minimize
from torch import nn
from walking import walk

from certtrain.attacks import Ascent, FrankWolfe
from certtrain.bounds import L2Ball, LinfBall, compute_bounds
from certtrain.bounds.l1 import L1Ball
from certtrain.noise import Noise
from certtrain.step import Batch, Step


def problem(seed: int, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """An image with entries at 0 and 1, and a form (or candidate) with zeros and ties."""
    torch.manual_seed(seed)
    image = (torch.rand(count, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
    form = torch.randn(count, dtype=torch.float64) * (torch.rand(count) < 0.8)
    form[1] = -form[0]
    return image, form


@walk("seed", range(15))
@walk("epsilon", [0.0, 0.05, 0.4, 1.0, 3.0, 50.0])
def test_concretise_is_the_linear_programme(epsilon, seed):
    """min <a, x + u - v> over u, v >= 0 with sum(u + v) <= epsilon, u <= 1 - x, v <= x."""
    image, form = problem(seed)
    found = L1Ball(epsilon).concretise(form[None, None], image[None]).item()
    x, a = image.tolist(), form.tolist()
    solved = linprog(
        [*a, *(-v for v in a)],
        A_ub=[[1.0] * 12],
        b_ub=[epsilon],
        bounds=[*((0, 1 - v) for v in x), *((0, v) for v in x)],
    )
    assert found == pytest.approx(float(form @ image) + solved.fun, abs=1e-9)


@walk("seed", range(15))
@walk("epsilon", [0.05, 0.4, 1.0, 3.0, 50.0])
def test_project_is_the_nearest_point(epsilon, seed):
    image, change = problem(seed)
    candidate = image + 2 * change
    found = L1Ball(epsilon).project(image[None], candidate[None])[0]
    x, c = image.numpy(), candidate.numpy()
    ball = {"type": "ineq", "fun": lambda z: epsilon - z.sum()}  # z = (u, v), x' = x + u - v
    solved = minimize(
        lambda z: ((x + z[:6] - z[6:] - c) ** 2).sum(), [0.0] * 12, constraints=[ball], method="SLSQP",
        bounds=[*((0, 1 - v) for v in x), *((0, v) for v in x)], options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    distance = float((found - candidate).square().sum())
    assert distance <= solved.fun + 1e-7
    assert L1Ball(epsilon).contains(image[None], found[None]).all()


def test_project_by_hand():
    """Changes 0.6 and -0.3 lose 0.2 each where 0.5 is to be left; where the first has room for 0.1 only, it gives up
    what it cannot use, and the second keeps everything."""
    images = torch.tensor([[0.2, 0.5], [0.9, 0.5]], dtype=torch.float64)
    candidates = images + torch.tensor([[0.6, -0.3]], dtype=torch.float64)
    expected = images + torch.tensor([[0.4, -0.1], [0.1, -0.3]], dtype=torch.float64)
    torch.testing.assert_close(L1Ball(0.5).project(images, candidates), expected, atol=1e-11, rtol=0)


def test_contains_adds_up_entries():
    images = torch.full((1, 4), 0.5, dtype=torch.float64)
    assert L1Ball(0.2).contains(images, images + 0.0499) and not L1Ball(0.2).contains(images, images + 0.0501)
    assert L1Ball(0.2).contains(images, images + 0.0501, slack=0.001)


def test_direction_is_one_entry():
    gradient = torch.tensor([[[1.0, -3.0], [3.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = torch.tensor([[[0.0, -1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(L1Ball(0.1).direction(gradient), expected)


def test_sample_is_uniform_in_the_ball():
    """The share of the radius is below r with probability r^n; signs are even; noise is keyed."""
    images = torch.full((4000, 1, 1, 3), 0.5)
    noise = Noise(3, torch.arange(4000))
    change = L1Ball(0.4).sample(images, noise, "eta")
    share = change.flatten(1).abs().sum(1) / 0.4
    assert change.shape == images.shape and change.dtype == torch.float32 and float(share.max()) <= 1 + 1e-6
    for r in (0.5, 0.8):
        assert float((share < r).double().mean()) == pytest.approx(r**3, abs=0.03)  # 3.8 standard deviations
    # in each entry |d| / epsilon is Beta(1, 3): mean 1/4
    assert (change.abs().mean(0).flatten() / 0.4 - 0.25).abs().max() < 0.015
    assert (change.mean(0).flatten() / 0.4).abs().max() < 0.02
    assert torch.equal(change[5:6], L1Ball(0.4).sample(images[:1], Noise(3, torch.tensor([5])), "eta"))
    assert L1Ball(0.4).sample(images[:0], Noise(3, torch.arange(0)), "eta").shape == (0, 1, 1, 3)


def test_one_step_of_frank_and_wolfe_is_the_linear_maximum():
    """Of a linear objective, in every ball; in an l_inf ball it is FGSM."""
    torch.manual_seed(0)
    last = nn.Linear(12, 2).double()
    model = nn.Sequential(nn.Flatten(), last)
    images = (torch.rand(5, 1, 3, 4, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
    batch = Batch(images, torch.zeros(5).long(), torch.arange(5))
    form = (last.weight[1] - last.weight[0]).detach()
    for ball in (L1Ball(0.7), L1Ball(3.0), L2Ball(0.5), LinfBall(0.2)):
        step = Step.evaluation(ball, Noise(0, batch.index))
        best = -ball.concretise((-form).reshape(1, 1, 1, 3, 4).expand(5, -1, -1, -1, -1), images)[:, 0]
        for steps in (1, 7):
            found = FrankWolfe(steps=steps)(model, batch, ball, step).images
            assert ball.contains(images, found).all()
            torch.testing.assert_close((found.flatten(1) * form).sum(1), best, atol=1e-9, rtol=0)
    assert torch.equal(found, Ascent(steps=1, step_size=1.0, start="zero")(model, batch, ball, step).images)


def test_frank_and_wolfe_beat_steps_along_one_entry():
    """On a network that is not linear the radius is spent on more than one pixel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2))
    batch = Batch(torch.rand(40, 1, 3, 4), torch.arange(40) % 2, torch.arange(40))
    step = Step.evaluation(L1Ball(3.0), Noise(0, batch.index))

    def loss(attack) -> float:
        images = attack(model, batch, L1Ball(3.0), step).images
        return F.cross_entropy(model(images), batch.labels).item()

    clean = F.cross_entropy(model(batch.images), batch.labels).item()
    along = loss(Ascent(steps=20, step_size=1.0, start="zero"))
    assert clean < along < loss(FrankWolfe(steps=20))


@pytest.mark.parametrize("layer", ["dense", "convolution"])
def test_bounds_of_a_network_contain_its_outputs(layer):
    torch.manual_seed(0)
    first = [nn.Flatten(), nn.Linear(18, 8)] if layer == "dense" else [nn.Conv2d(2, 2, 2, padding=1), nn.Flatten()]
    model = nn.Sequential(*first, nn.ReLU(), nn.Linear(8 if layer == "dense" else 32, 3)).double()
    images, ball = torch.rand(4, 2, 3, 3, dtype=torch.float64), L1Ball(0.8)
    bounds = compute_bounds(model, ball.region(images))
    widest = compute_bounds(model, LinfBall(0.8).region(images))
    for seed in range(40):
        change = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 5
        logits = model(ball.project(images, images + change)).detach()
        assert (logits >= bounds.lower - 1e-9).all() and (logits <= bounds.upper + 1e-9).all()
    assert (bounds.upper - bounds.lower < widest.upper - widest.lower).all()
