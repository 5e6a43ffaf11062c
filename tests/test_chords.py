"""Gradients by the slopes of chords, and counterexamples behind activations that are flat nearly everywhere."""

from dataclasses import replace

import pytest
import torch
from hidden import KINDS, hidden
from problems import alone, problem_of, unknown
from torch import nn

from certtrain.bounds import Bounds, LinfBall
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import Relu
from certtrain.verifiers import BabStage, CrownStage, FalsifyStage, Problem, Search
from certtrain.verifiers.chords import Chords
from certtrain.verifiers.descent import Points, descend, random_points
from certtrain.verifiers.problem import rows_of_clauses

SIZE = 12


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def gradient(chords: Chords, points: torch.Tensor, share: float) -> torch.Tensor:
    with torch.enable_grad():
        at = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(chords(at, torch.full((len(at),), share))[:, 0].sum(), at)
    return slope


class TestGradient:
    @pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Tanh(), nn.GELU()])
    def test_mixes_the_activations_slope_with_the_chords(self, activation):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(6, 10), activation, nn.Linear(10, 3)).eval()
        images = torch.rand(4, 1, 1, 6)
        problem = problem_of(model, images, torch.zeros(4, dtype=torch.int64), LinfBall(0.3), 3)
        known = alone(CrownStage(), problem).known
        chords = Chords.of(known.network, torch.float32, known.bounds)
        points = images + 0.2 * torch.rand(images.shape)
        assert torch.equal(chords(points, torch.full((4,), 0.7)), known.network(points))
        (ends,) = known.bounds.values()
        slope = (activation(ends.upper) - activation(ends.lower)) / (ends.upper - ends.lower)
        by_chords = ((slope * model[3].weight[0]) @ model[1].weight).reshape(images.shape)
        with torch.enable_grad():
            at = points.clone().requires_grad_()
            (own,) = torch.autograd.grad(model(at)[:, 0].sum(), at)
        for share in (0.0, 0.3, 1.0):
            expected = (1 - share) * own + share * by_chords
            assert torch.allclose(gradient(chords, points, share), expected, atol=1e-5)

    def test_is_the_networks_own_without_bounds_and_finite_at_any_width(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        problem = problem_of(model, torch.rand(2, 1, 1, 2), torch.zeros(2, dtype=torch.int64), LinfBall(0.0), 2)
        known = alone(CrownStage(), problem).known
        none = Chords.of(known.network, torch.float32, {})
        assert torch.equal(gradient(none, problem.region.images, 0.5), gradient(none, problem.region.images, 0.0))
        assert (
            gradient(Chords.of(known.network, torch.float32, known.bounds), problem.region.images, 1.0).isfinite().all()
        )


def behind_dead_neurons(count: int) -> Problem:
    """Another class wins near a corner of the box, by a neuron that is 0 everywhere else; there the gradient leads to
    the opposite corner."""
    draw = torch.Generator().manual_seed(2)
    images = torch.full((count, 1, 1, SIZE), 0.5)
    side = torch.randint(2, (SIZE,), generator=draw) * 2.0 - 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    # shares t in [-1, 1] of the way to the corner: 12 t - 9, and 1 + t
    way = side / (SIZE * 0.2)
    model[1].weight.copy_(torch.stack([12 * way, way]))
    model[1].bias.copy_(-model[1].weight @ images[0].flatten() + torch.tensor([-9.0, 1.0]))
    model[3].weight.copy_(torch.tensor([[-1.0, 0.1], [0.0, 0.0]]))
    model[3].bias.copy_(torch.tensor([1.0, 0.0]))
    return problem_of(model, images, torch.zeros(count, dtype=torch.int64), LinfBall(0.2), 2)


class TestDeadNeurons:
    def test_descent_by_the_networks_own_gradient_stays_behind_them(self):
        assert alone(FalsifyStage(starts=40), behind_dead_neurons(3)).statuses == [None] * 3  # no bounds, no chords

    def test_descent_by_chords_passes_them(self):
        problem = behind_dead_neurons(3)
        known = unknown(problem).with_bounds(alone(CrownStage(), problem).known.bounds)
        finding = alone(FalsifyStage(starts=1), problem, known)
        assert finding.statuses == ["falsified"] * 3
        points = torch.stack(finding.counterexamples)
        assert problem.region.contains(points).all()
        logits = problem.network(points)
        assert (logits[:, 1] >= logits[:, 0]).all()

    def test_a_search_needs_no_split(self):
        finding = alone(BabStage(Search(most=1), 1e6), behind_dead_neurons(3))
        assert finding.statuses == ["falsified"] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_descent_by_chords_meets_what_training_hid_from_gradients(kind):
    """Four random points for each image and clause; every counterexample is the network's own."""
    with torch.enable_grad():
        case = hidden(kind)
    classes = case.model(case.images).shape[1]
    problem = problem_of(case.model, case.images, case.labels, LinfBall(case.epsilon), classes)
    known = alone(CrownStage(), problem).known
    members, clauses = rows_of_clauses(problem.specification.clauses)
    image, clause, stream = torch.cartesian_prod(torch.arange(len(problem)), torch.arange(clauses), torch.arange(4)).T
    start = Points(image, clause, problem.region.images[image], 2 * stream)  # the even ones go by chords
    start = replace(start, points=random_points(problem, start, 3))
    met = []
    for bounds in ({}, known.bounds):
        refuted = set[int]()

        def refute(number: int, point: torch.Tensor, refuted=refuted) -> bool:
            logits = problem.network(point[None])[0]
            assert problem.region.take(torch.tensor([number])).contains(point[None]).all()
            if (logits.argmax() != case.labels[number]).item():
                refuted.add(number)
            return number in refuted

        chords = Chords.of(known.network, torch.float32, bounds)
        descend(problem, chords, members, start, refute, steps=20, first=0.25, last=0.01, key=0)
        met.append(refuted)
    assert met[0] < met[1]


def test_functions_of_whole_rows_have_no_chords():
    """The chord of one entry is nothing that softmax, norms or log-sum-exp have: descents use their own gradients."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Softmax(1), nn.Linear(6, 3)).double()
    network, x = fold(model, torch.Size((4,))), torch.rand(2, 4, dtype=torch.float64)
    bounds = {number: Bounds(-torch.ones(2, 6, dtype=x.dtype), torch.ones(2, 6, dtype=x.dtype))
              for number in network.nonlinear}  # fmt: skip
    chords = Chords.of(network, x.dtype, bounds)
    assert [type(network.operations[number]) for number in chords.slopes] == [Relu]
    point = x.clone().requires_grad_()
    other = x.clone().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(chords(point, torch.zeros(2))[:, 0].sum(), point)
        (own,) = torch.autograd.grad(model(other)[:, 0].sum(), other)
    torch.testing.assert_close(found, own)
