"""Counterexamples that training hid from gradients: never called robust, and found by the search."""

import pytest
import torch
from hidden import DEPTH, KINDS, Hidden, descended, hidden, margins
from problems import alone, problem_of

from certtrain.bounds import LinfBall
from certtrain.verifiers import BabStage, InputSplitStage, Judge, Problem, Search, Stage
from certtrain.verifiers.neuron_split import LinearProgramSolver, SignBounder


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=KINDS)
def case(request) -> Hidden:
    with torch.enable_grad():
        return hidden(request.param)


class Refusing(Judge):
    """Refuses every candidate."""

    def __call__(self, problem: Problem, number: int, image: torch.Tensor) -> bool:
        return False


def problem_from(case: Hidden) -> Problem:
    return problem_of(case.model, case.images, case.labels, LinfBall(case.epsilon), case.model(case.images).shape[1])


def search_of(problem: Problem, most: int, judge: Judge | None = None) -> Stage:
    piecewise_linear = not any(isinstance(module, torch.nn.Tanh) for module in problem.network.modules())
    judge = judge or Judge()
    return BabStage(Search(most=most), 1e6, judge) if piecewise_linear else InputSplitStage(1e6, judge)


def test_descent_seldom_meets_the_planted_points(case):
    assert LinfBall(case.epsilon).contains(case.images, case.counterexamples).all()
    assert (margins(case.model, case.counterexamples, case.labels) < -DEPTH).all()
    draw, repeats = torch.Generator().manual_seed(5), 16
    shares = 2 * torch.rand(repeats, *case.images.shape, generator=draw) - 1
    start = (case.images + case.epsilon * shares).flatten(0, 1)
    ends = descended(case.model, case.images, case.labels, case.epsilon, start, 20)
    assert (margins(case.model, ends, case.labels.repeat(repeats)) <= 0).float().mean() < 0.1


def test_the_search_finds_them(case):
    problem = problem_from(case)
    finding = alone(search_of(problem, most=500), problem)
    assert finding.statuses == ["falsified"] * len(problem)
    for number, point in enumerate(finding.counterexamples):
        one = slice(number, number + 1)
        assert LinfBall(case.epsilon).contains(case.images[one], point[None]).all()
        assert (margins(case.model, point[None], case.labels[one]) <= 0).all()


def test_none_is_called_robust_where_every_candidate_is_refused(case):
    problem = problem_from(case)
    if any(isinstance(module, torch.nn.Tanh) for module in problem.network.modules()):
        pytest.skip("splitting inputs has no limit but time")
    finding = alone(search_of(problem, 10, Refusing()), problem)
    assert "verified" not in finding.statuses and "falsified" not in finding.statuses


def test_descents_shorten_the_search_and_repeat(monkeypatch):
    monkeypatch.setattr(LinearProgramSolver, "probing", 0.0)  # a share of the time
    with torch.enable_grad():
        problem = problem_from(hidden("inner"))
    bounded, original = list[int](), SignBounder.bound
    monkeypatch.setattr(SignBounder, "bound", lambda self, some: bounded.append(len(some)) or original(self, some))
    ends = []
    for share in (0.0, 0.1, 0.1):
        bounded.clear()
        finding = alone(BabStage(Search(descents=share), 1e6), problem)
        assert finding.statuses == ["falsified"] * len(problem)
        ends.append((sum(bounded), [point.tolist() for point in finding.counterexamples]))
    assert ends[1] == ends[2] and 2 * ends[1][0] < ends[0][0]
