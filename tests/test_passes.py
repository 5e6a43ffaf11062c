"""Backward passes are made for boxes where they raise bounds by more than halving does for the same work."""

from itertools import pairwise

import pytest
import torch
from problems import unknown
from torch import Tensor, nn

from certtrain.bounds import Bounds, Box
from certtrain.bounds.crown import crown_bounds
from certtrain.bounds.folding import fold
from certtrain.verifiers import Problem, Specification
from certtrain.verifiers.input_split import split_inputs
from certtrain.verifiers.passes import TRIALS, BackwardPasses
from certtrain.verifiers.search_record import SearchRecord


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def wide_network(width: int = 200) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise([2, width, width, width, 1]):
        layer = nn.Linear(before, after)
        layer.weight.copy_(1.4 * torch.randn(after, before, generator=draw) / before**0.5)
        layer.bias.copy_(0.1 * torch.randn(after, generator=draw))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


class Asked:
    """Three boxes, of which the second has the lowest forward bound, with all neurons unstable."""

    def __init__(self, width: int = 200):
        network = fold(wide_network(width), torch.Size([2]))
        self.passes, self.box = BackwardPasses(network), Box(torch.zeros(3, 2), torch.ones(3, 2))
        one = torch.ones(3, width)
        self.bounds = {place: Bounds(-one, one) for place in network.nonlinear}

    def __call__(self, before: float = -5.0, open_: tuple[bool, ...] = (True, True, True)) -> list[bool]:
        forward = torch.tensor([-1.0, -3.0, -2.0])
        return self.passes.chosen(
            torch.tensor(open_), forward, torch.full((3,), before), self.bounds, self.box
        ).tolist()  # fmt: skip

    def saw(self, by_halving: float, by_passes: float) -> None:
        zero = torch.full((3,), -100.0)
        self.passes.saw_forward(zero + by_halving, zero, self.box)
        self.passes.saw_backward(zero, zero + by_passes)


class TestChoice:
    def test_the_worst_box_is_tried_first(self):
        asked = Asked()
        assert asked() == [False, True, False]
        assert Asked()(open_=(True, False, True)) == [False, False, True]
        assert Asked()(open_=(False, False, False)) == [False] * 3

    def test_whole_sets_are_left_to_earlier_stages(self):
        assert Asked()(before=-torch.inf) == [False] * 3

    def test_few_unstable_neurons_are_always_passed(self):
        assert Asked(width=20)(before=-torch.inf) == [True] * 3

    def test_the_rise_for_the_work_decides(self):
        """400 rows to the last layer for 3 columns: about 2 ** 8 boxes."""
        for by_halving, by_passes, expected in (
            (0.1, 2.0, True),
            (1.0, 2.0, False),
            (0.0, 1.0, True),
            (1.0, 0.0, False),
        ):
            asked = Asked()
            asked.saw(by_halving, by_passes)
            assert asked() == [expected] * 3

    def test_passes_that_prove_what_forward_bounds_do_not_are_made(self):
        """Bounds far below 0 rise fast by halving, too fast to count its levels."""
        asked = Asked()
        asked.saw(50.0, 1.0)
        assert asked() == [False] * 3
        asked.passes.saw_backward(torch.full((1,), -100.0), torch.ones(1))
        assert asked() == [True] * 3

    def test_passes_are_tried_again(self):
        asked, calls = Asked(), 0
        asked.saw(1.0, 0.5)
        while not any(chosen := asked()):
            asked.passes.saw_forward(torch.full((3,), -99.0), torch.full((3,), -100.0), asked.box)
            calls += 1
        assert chosen == [False, True, False]
        assert TRIALS * 100 < 3 * calls < TRIALS * 1000


class TestSearch:
    def test_it_repeats_exactly(self):
        model = wide_network()
        region = Box(torch.tensor([[0.2, 0.2]]), torch.tensor([[0.4, 0.4]]))
        shares = torch.cartesian_prod(torch.linspace(0, 1, 50), torch.linspace(0, 1, 50))
        least = model(region.lower + shares * (region.upper - region.lower)).min()
        found: list[tuple[bool, int, Tensor]] = []
        for _ in range(2):
            specification = Specification(torch.ones(1, 1, 1), (0.1 - least).reshape(1, 1), torch.tensor([0]))
            problem = Problem(model, region, specification, torch.arange(1))
            known = unknown(problem)
            known, record = known.with_bounds(crown_bounds(known.network, region)), SearchRecord()
            outcome = split_inputs(problem, known, 60.0, lambda number, point: False, record=record)
            found.append((bool(outcome.proved.all()), len(record.subproblems), outcome.lower))
        assert found[0][0] and found[0] == found[1] and found[0][1] > 1
