"""Clipped bounds of neurons: no point that may be a counterexample is lost, and nothing is claimed above the level."""

from dataclasses import replace

import pytest
import torch
from planted import KINDS
from problems import problem_of
from test_tighter_bounds import a_problem, a_search, hard_problem, known_of, points_of
from torch import nn

from certtrain.bounds import LinfBall
from certtrain.bounds.interval import Interval
from certtrain.bounds.rounding import FLOAT32, REAL
from certtrain.verifiers import Search
from certtrain.verifiers import neuron_split as room
from certtrain.verifiers.neuron_clipping import NeuronLines, scaled
from certtrain.verifiers.neuron_split import SignBounder
from certtrain.verifiers.neurons import Neurons
from certtrain.verifiers.sign_space import SignSpace
from certtrain.verifiers.tighter_bounds import tightened, tightening_work

SIZES = 1e-9  # rounding of float64, by sums of some hundred terms of size 1


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def at_once(monkeypatch):
    """Neurons are tightened, and so clipped, from the first subproblem on."""
    monkeypatch.setattr(
        room, "tightening_work", lambda network, bounds, steps: tightening_work(network, bounds, steps) / 1e9
    )


def random_signs(space, some, draw):
    """The subproblems with signs assumed for some of their unstable neurons."""
    signs = torch.randint(-1, 2, some.signs.shape, generator=draw).to(torch.int8)
    chosen = (torch.rand(some.signs.shape, generator=draw) < 0.3) & space.columns.take(some.image).real
    return replace(some, signs=torch.where(chosen, signs, some.signs))


def inside(space, some, number, values, signs):
    """(B,) of points of subproblem ``number`` that satisfy its signs, given the neurons' inputs (B, N)."""
    columns = space.columns.take(some.image[number : number + 1])
    own = values[:, columns.neurons[0]] * signs[number]
    return ((own >= 0) | ~columns.real[0]).all(1)


class TestNothingIsLost:
    @pytest.mark.parametrize("rounding", [None, REAL, FLOAT32], ids=["nearest", "real", "float32"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_points_below_the_level_keep_their_values(self, kind, rounding):
        met = narrower = emptied = 0
        for seed in range(4):
            draw = torch.Generator().manual_seed(seed)
            problem = a_problem(seed, kind)
            space = SignSpace(problem, known_of(problem, rounding))
            space.tighten(torch.arange(len(problem)), 4)
            roots = space.restored(space.roots())
            if not len(roots):
                continue
            bounder = SignBounder(space, Search(root_steps=0), recording=False)
            for given in (roots, *(random_signs(space, roots, draw) for _ in range(3))):
                before = space.clamped(given)
                after = bounder.bound(given).subproblems
                emptied += int((after.bound == after.level).sum())
                narrower += int(((after.upper - after.lower) < (before.upper - before.lower) - 1e-6).sum())
                for point in points_of(problem, 300):
                    every = space.network.values(point)
                    flat = space.neurons.together({
                        place: every[space.network.operations[place].inputs[0]] for place in space.neurons.places
                    })  # fmt: skip
                    rows = problem.specification.values(space.network(point))
                    for number in range(len(given)):
                        image, goal = int(given.image[number]), int(given.goal[number])
                        worst = rows[image, space.clauses[goal]].max()
                        ok = inside(space, given, number, flat[image : image + 1], given.signs)[0]
                        if not ok or not worst < after.level[number]:
                            if ok:  # no bound above a value that is taken
                                assert after.bound[number] <= worst + SIZES
                            continue
                        met += 1
                        columns = space.columns.take(given.image[number : number + 1])
                        values = flat[image, columns.neurons[0]][columns.real[0]]
                        low, up = (end[number][columns.real[0]] for end in (after.lower, after.upper))
                        assert (low <= values + SIZES).all() and (values <= up + SIZES).all()
                        signs = after.signs[number][columns.real[0]]
                        assert (values * signs >= -SIZES).all()
                        assert after.bound[number] <= worst + SIZES
        assert met > 20
        assert narrower > 0 or kind in ("conv",)

    @pytest.mark.parametrize("kind", KINDS)
    def test_lines_are_below_and_above_the_inputs(self, kind):
        problem = a_problem(1, kind)
        known = known_of(problem)
        space = SignSpace(problem, known)
        _, lines = tightened(known.network, space.region, known.bounds, space.columns, steps=3, room=1 << 30)
        assert len(lines) == len(problem)
        hull = problem.region.hull
        neurons = Neurons.of(known.network)
        for point in points_of(problem, 100):
            every = known.network.values(point)
            flat = neurons.together({p: every[known.network.operations[p].inputs[0]] for p in neurons.places})
            z = torch.where(hull.radius > 0, (point - hull.center) / hull.radius, 0).flatten(1)
            for image, own in enumerate(lines):
                columns = space.columns.take(torch.tensor([image]))
                assert own.columns.tolist() == columns.real[0].nonzero().flatten().tolist()
                values = flat[image, columns.neurons[0, own.columns]]
                low, high = (own.forms @ z[image] + own.constants).split(len(values))
                assert (low <= values + SIZES).all() and (values <= -high + SIZES).all()


class TestRoom:
    def test_whole_operations_are_kept_from_the_last(self):
        problem = hard_problem()
        known = known_of(problem)
        space = SignSpace(problem, known)
        sizes = space.columns.sizes
        each = 2 * 4 * 8 * len(problem)  # bytes of a column
        for count in range(len(sizes) + 1):
            needed = sum(sizes[count:]) * each
            _, lines = tightened(known.network, space.region, known.bounds, space.columns, steps=1, room=needed)
            firsts = [int(own.columns[0]) for own in lines]
            assert firsts == ([sum(sizes[:count])] * len(problem) if count < len(sizes) else [])

    def test_no_more_is_kept_than_there_is_room_for(self, monkeypatch):
        problem = hard_problem()
        space = SignSpace(problem, known_of(problem))
        whole = int(space.columns.real[0].sum()) * 2 * 4 * 8
        monkeypatch.setattr(room.memory, "kept", lambda like: 2 * whole)
        for image in range(3):
            space.tighten(torch.tensor([image]), 1)
        assert list(space.lines) == [0]


def problem_of_many_inputs():
    """One image of 36 pixels in a network of 80 neurons, to be split some thousand times without clipping."""
    draw = torch.Generator().manual_seed(4)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((36, 40), (40, 40), (40, 3)):
        layer = nn.Linear(before, after).double()
        layer.weight.copy_(1.5 * torch.randn(after, before, generator=draw, dtype=torch.float64) / before**0.5)
        layer.bias.copy_(0.3 * torch.randn(after, generator=draw, dtype=torch.float64))
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    images = torch.rand(2, 1, 6, 6, generator=draw, dtype=torch.float64)[1:]
    problem = problem_of(model, images, model(images).argmax(1), LinfBall(0.1), 3)
    lift = 0.5 - least_margin(problem, 3000).unsqueeze(1)
    specification = replace(problem.specification, offsets=lift.expand_as(problem.specification.offsets))
    return replace(problem, specification=specification)


def least_margin(problem, count):
    """(B,) the least worst margin of ``count`` points of each image's box."""
    specification = problem.specification
    values = (specification.worst(specification.values(problem.network(p))) for p in points_of(problem, count))
    return torch.stack(list(values)).amin(0)


class TestSearch:
    def test_it_needs_fewer_subproblems_and_finds_the_same(self, at_once):
        problem = problem_of_many_inputs()
        plain, clipped = (a_search(problem, Search(batch=16, programs=0, clip=clip)) for clip in (False, True))
        assert plain.proved.all() and clipped.proved.all()
        assert clipped.statistics[0].children < 0.5 * plain.statistics[0].children

    def test_no_bound_is_claimed_above_a_margin_that_is_taken(self, at_once):
        problem = hard_problem()
        found = a_search(problem, Search(batch=4, programs=0))
        assert (found.lower > 0).all() and (found.lower <= least_margin(problem, 3000)).all()

    def test_a_search_without_a_limit_repeats_exactly(self, at_once):
        problem = hard_problem()
        first, second = (a_search(problem, Search(batch=4)) for _ in range(2))
        assert torch.equal(first.lower, second.lower)
        assert [one.record() for one in first.statistics] == [one.record() for one in second.statistics]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", range(3))
    def test_leaves_stay_exact(self, kind, seed, at_once):
        """Thresholds a hair on either side of what sampling and the search itself find: all are decided, rightly."""
        problem = a_problem(seed, kind, count=2, epsilon=0.2)
        specification, met = problem.specification, least_margin(problem, 1000)
        for lift in (0.02, -0.02):
            offsets = specification.offsets - met.unsqueeze(1) + lift
            moved = replace(problem, specification=replace(specification, offsets=offsets))
            found = a_search(moved, Search(batch=3, programs=64))
            for image in range(2):
                assert found.proved[image] or found.counterexamples[image] is not None, found.reasons[image]
                if lift < 0:
                    assert found.counterexamples[image] is not None


class TestNeuronLines:
    def test_scaled_forms_take_the_same_values(self):
        draw = torch.Generator().manual_seed(0)
        center, radius, x = (torch.rand(5, generator=draw, dtype=torch.float64) for _ in range(3))
        forms, constants = torch.randn(3, 5, generator=draw).double(), torch.randn(3, generator=draw).double()
        own = scaled(forms, constants, Interval(center, radius))
        torch.testing.assert_close(own[0] @ ((x - center) / radius) + own[1], forms @ x + constants)

    def test_only_wanted_unstable_neurons_are_clipped(self):
        forms = torch.ones(3, 1)
        lines = NeuronLines(torch.cat([forms, -forms]), torch.zeros(6), torch.tensor([1, 2, 3]))
        lower, upper = torch.tensor([[-5.0, -1.0, -1.0, 0.0]]), torch.tensor([[5.0, 1.0, 1.0, 1.0]])
        wanted = torch.tensor([[True, True, False, True]])
        cut, offset = torch.tensor([[1.0]]), torch.tensor([0.5])  # z <= -0.5
        low, up = lines.clipped(cut, offset, lower, upper, wanted)
        assert low.tolist() == [[-5.0, -1.0, -1.0, 0.0]]
        assert up[0, 0] == 5 and up[0, 2] == 1 and up[0, 3] == 1 and -0.5 <= up[0, 1] < -0.3
