"""Linear bounds where few inputs vary: CROWN starts from forward bounds, and backward passes for many unstable neurons
are made where halving at every input takes more work."""

from itertools import pairwise

import pytest
import torch
from networks import Apply
from problems import alone, unknown
from torch import Tensor, nn

from certtrain.bounds import Box
from certtrain.bounds.crown import crown_bounds
from certtrain.bounds.forward_linear import forward_bounds
from certtrain.verifiers import Problem, Specification, box_bounds, stages
from certtrain.verifiers.box_bounds import BoxBounds
from certtrain.verifiers.input_split import split_inputs
from certtrain.verifiers.search_record import SearchRecord
from certtrain.verifiers.stages import CrownIbpStage, CrownStage


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def wide_network(width: int = 200, inputs: int = 2) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise([inputs, width, width, width, 1]):
        layer = nn.Linear(before, after)
        layer.weight.copy_(1.4 * torch.randn(after, before, generator=draw) / before**0.5)
        layer.bias.copy_(0.1 * torch.randn(after, generator=draw))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def problem_over(region: Box, offset: float, model: nn.Module) -> Problem:
    count = len(region.lower)
    specification = Specification(torch.ones(count, 1, 1), torch.full((count, 1), offset), torch.tensor([0]))
    return Problem(model, region, specification, torch.arange(count))


def boxes_passed(monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: int, outer: bool = True) -> list[int]:
    """How many boxes get backward passes, of one whole set and two of its halves."""
    whole = Box(-torch.ones(1, inputs), torch.ones(1, inputs))
    problem = problem_over(whole, -100.0, model)
    known = unknown(problem)
    rows, offsets = known.rows_of(problem.specification)
    given = forward_bounds(known.network, whole) if outer else {}
    bounds = BoxBounds(known.network, rows, offsets, torch.tensor([[0]]), given, whole)
    passed, original = list[int](), crown_bounds

    def counted(network, region, given=None):
        passed.append(len(region.lower))
        return original(network, region, given)

    monkeypatch.setattr(box_bounds, "crown_bounds", counted)
    lower = whole.hull.lower.repeat(3, 1)
    lower[1, 0] = lower[2, 1] = 0.0
    found = bounds(Box(lower, whole.hull.upper.repeat(3, 1)), torch.zeros(3, dtype=torch.long))
    assert (found.clauses < 0).all()
    return passed


class TestChoice:
    def test_few_unstable_neurons_are_always_passed(self, monkeypatch):
        assert boxes_passed(monkeypatch, wide_network(20), 2) == [3]

    def test_four_parts_are_bounded_forward_for_less_than_hundreds_of_rows(self, monkeypatch):
        assert boxes_passed(monkeypatch, wide_network(200), 2) == []
        assert boxes_passed(monkeypatch, wide_network(200), 2, outer=False) == []

    def test_hundreds_of_parts_are_not(self, monkeypatch):
        """Whole sets are left to earlier stages, where these were."""
        assert boxes_passed(monkeypatch, wide_network(300, 8), 8) == [2]
        assert boxes_passed(monkeypatch, wide_network(300, 8), 8, outer=False) == [3]


class TestTightening:
    def halved(self, tighten: bool, rounds: int) -> tuple[BoxBounds, Box]:
        """Bounds that were asked for two halves of a set ``rounds`` times."""
        whole = Box(-0.2 * torch.ones(1, 8), 0.2 * torch.ones(1, 8))
        problem = problem_over(whole, -100.0, wide_network(300, 8))
        known = unknown(problem)
        rows, offsets = known.rows_of(problem.specification)
        given = crown_bounds(known.network, whole)
        bounds = BoxBounds(known.network, rows, offsets, torch.tensor([[0]]), given, whole, tighten)
        lower = whole.hull.lower.repeat(2, 1)
        lower[0, 0] = lower[1, 1] = 0.0
        for _ in range(rounds):
            bounds(Box(lower, whole.hull.upper.repeat(2, 1)), torch.zeros(2, dtype=torch.long))
        return bounds, whole

    def test_bounds_of_the_whole_set_are_tightened_once_and_hold(self, monkeypatch):
        calls, original = list[int](), box_bounds.tightened

        def counted(network, region, bounds, columns, steps):
            calls.append(len(region.hull.center))
            return original(network, region, bounds, columns, steps)

        monkeypatch.setattr(box_bounds, "tightened", counted)
        early, _ = self.halved(tighten=True, rounds=1)
        assert not calls
        late, whole = self.halved(tighten=True, rounds=6)
        assert calls == [1]
        shares = torch.cat([torch.rand(500, 8), torch.rand(500, 8).round()])
        values = late.network.values(whole.lower + shares * (whole.upper - whole.lower))
        narrower = 0
        for place, ends in late.outer.items():
            before = early.outer[place]
            assert (ends.lower >= before.lower).all() and (ends.upper <= before.upper).all()
            narrower += int((ends.upper - ends.lower < before.upper - before.lower - 1e-4).sum())
            value = values[late.network.operations[place].inputs[0]]
            assert (ends.lower - 1e-5 <= value).all() and (value <= ends.upper + 1e-5).all()
        assert narrower > 100

    def test_a_record_has_no_place_for_it(self, monkeypatch):
        monkeypatch.setattr(box_bounds, "tightened", None)
        self.halved(tighten=False, rounds=6)


class TestSearch:
    def test_it_repeats_exactly(self):
        model = wide_network()
        region = Box(torch.tensor([[0.2, 0.2]]), torch.tensor([[0.4, 0.4]]))
        shares = torch.cartesian_prod(torch.linspace(0, 1, 50), torch.linspace(0, 1, 50))
        least = model(region.lower + shares * (region.upper - region.lower)).min()
        found: list[tuple[bool, int, Tensor]] = []
        for _ in range(2):
            problem = problem_over(region, 0.1 - float(least), model)
            known = unknown(problem)
            known, record = known.with_bounds(crown_bounds(known.network, region)), SearchRecord()
            outcome = split_inputs(problem, known, 60.0, lambda number, point: False, record=record)
            found.append((bool(outcome.proved.all()), len(record.subproblems), outcome.lower))
        assert found[0][0] and found[0] == found[1] and found[0][1] > 1


def field_network(inputs: int = 2) -> nn.Module:
    """A dense layer spreads few inputs over an image, as in VNN-COMP's cifar_biasfield."""
    draw = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 32), Apply(lambda m, x: x.view(-1, 2, 4, 4)), nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) / parameter[0].numel() ** 0.5)
    return model.eval()


class TestCrownStage:
    def test_it_starts_from_forward_bounds(self, monkeypatch):
        """In two parts of the batch, each as the whole."""
        monkeypatch.setattr(stages, "rows_at_a_time", lambda network, batch, like: 2)
        lower = torch.linspace(-1, 1, 6).reshape(3, 2)
        problem = problem_over(Box(lower, lower + 0.5), 0.0, field_network())
        known = unknown(problem)
        start = alone(CrownIbpStage(), problem, known).known.bounds
        found = alone(CrownStage(), problem, known).known
        forward, crown = (way(known.network, problem.region) for way in (forward_bounds, crown_bounds))
        narrower = 0
        for place, ends in found.bounds.items():
            for other in (start[place], forward[place], crown[place]):
                assert (ends.lower >= other.lower - 1e-5).all() and (ends.upper <= other.upper + 1e-5).all()
            narrower += int((ends.upper - ends.lower < 0.7 * (crown[place].upper - crown[place].lower)).sum())
        assert narrower > 10
        for share in torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * 2):
            values = known.network.values(lower + 0.5 * share)
            for place, ends in found.bounds.items():
                value = values[known.network.operations[place].inputs[0]]
                assert (ends.lower - 1e-5 <= value).all() and (value <= ends.upper + 1e-5).all()

    def test_where_many_inputs_vary_it_does_not(self, monkeypatch):
        monkeypatch.setattr(stages, "forward_bounds", None)
        lower = torch.zeros(1, stages.INPUTS + 1)
        problem = problem_over(Box(lower, lower + 0.5), 0.0, field_network(stages.INPUTS + 1))
        alone(CrownStage(), problem, unknown(problem))
