"""Bounds of the search: tightened ones lose no value that a network takes, gains are upper bounds, work is counted."""

from dataclasses import replace

import pytest
import torch
from planted import KINDS, random_network
from problems import problem_of, unknown
from torch import nn

from certtrain.bounds import LinfBall
from certtrain.bounds.crown import crown_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.rounding import FLOAT32, REAL
from certtrain.verifiers import Judge, Search
from certtrain.verifiers import neuron_split as room
from certtrain.verifiers.branching import gains
from certtrain.verifiers.neuron_split import SignBounder, SignSplitter, split_neurons
from certtrain.verifiers.neurons import Columns, Neurons
from certtrain.verifiers.optimise import Subproblems, maximise, starting_slopes
from certtrain.verifiers.sign_space import SignSpace
from certtrain.verifiers.tighter_bounds import tightened


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def a_problem(seed: int, kind: str, count: int = 3, epsilon: float = 0.3):
    """Images that a random network gets right, in float64."""
    draw = torch.Generator().manual_seed(seed)
    shape = torch.Size((1, 3, 3) if kind in ("conv", "residual", "max_pool") else (1, 1, 2 + seed % 3))
    model = random_network(kind, shape, 3, draw, 1.0).eval().double()
    images = torch.rand(count, *shape, generator=draw, dtype=torch.float64)
    return problem_of(model, images, model(images).argmax(1), LinfBall(epsilon), 3)


def hard_problem():
    """Three images of a network of 60 neurons, whose least margin is about 0.05, to be split dozens of times."""
    draw = torch.Generator().manual_seed(4)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((4, 20), (20, 20), (20, 20), (20, 3)):
        layer = nn.Linear(before, after).double()
        layer.weight.copy_(1.5 * torch.randn(after, before, generator=draw, dtype=torch.float64) / before**0.5)
        layer.bias.copy_(0.3 * torch.randn(after, generator=draw, dtype=torch.float64))
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    images = torch.rand(3, 1, 2, 2, generator=draw, dtype=torch.float64)
    labels = model(images).argmax(1)
    problem = problem_of(model, images, labels, LinfBall(0.4), 3)
    specification = problem.specification
    met = torch.stack([specification.worst(specification.values(model(point))) for point in points_of(problem, 3000)])
    lift = 0.05 - met.amin(0).unsqueeze(1).expand_as(specification.offsets)
    return replace(problem, specification=replace(specification, offsets=lift))


def known_of(problem, rounding=None):
    shape = problem.region.images.shape[1:]
    network = fold(problem.network, shape, dtype=torch.float64, as_written=rounding is not None)
    network = replace(network, rounding=rounding)
    known = unknown(problem, network)
    return known.with_bounds(crown_bounds(network, known.region_of(problem)))


def points_of(problem, count=200):
    draw = torch.Generator().manual_seed(1)
    hull = problem.region.hull
    shares = torch.rand(count, *hull.center.shape, generator=draw, dtype=torch.float64)
    shares[::2] = shares[::2].round()  # corners
    return hull.lower + shares * (hull.upper - hull.lower)


def unstable_of(known):
    neurons = Neurons.of(known.network)
    lower, upper = neurons.ends(known.bounds, known.rows)
    return Columns.of(neurons, (lower < 0) & (upper > 0))


class TestTightened:
    @pytest.mark.parametrize("rounding", [None, REAL, FLOAT32], ids=["nearest", "real", "float32"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_no_value_is_lost_and_no_bound_is_looser(self, kind, rounding):
        narrower = False
        for seed in range(3):
            problem = a_problem(seed, kind)
            known = known_of(problem, rounding)
            network = known.network
            found, lines = tightened(network, known.region_of(problem), known.bounds, unstable_of(known), steps=4)
            assert not lines  # there was no room for any
            assert found.keys() == known.bounds.keys()
            for place, bounds in found.items():
                before = known.bounds[place]
                assert (bounds.lower >= before.lower).all() and (bounds.upper <= before.upper).all()
                narrower |= bool((bounds.upper - bounds.lower < before.upper - before.lower - 1e-6).any())
            for point in points_of(problem):
                values = network.values(point)
                for place, bounds in found.items():
                    entering = values[network.operations[place].inputs[0]]
                    assert (bounds.lower <= entering + 1e-12).all() and (entering - 1e-12 <= bounds.upper).all()
        assert narrower or kind == "conv"  # one hidden layer has nothing to tighten

    def test_each_image_is_bounded_as_alone(self):
        problem = a_problem(0, "conv", count=4)
        known = known_of(problem)
        together, _ = tightened(known.network, problem.region, known.bounds, unstable_of(known))
        for number in range(4):
            at = torch.tensor([number])
            one = known.subset(at)
            alone, _ = tightened(known.network, problem.region.take(at), one.bounds, unstable_of(one))
            for place, bounds in alone.items():
                torch.testing.assert_close(bounds.lower[0], together[place].lower[number], rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(bounds.upper[0], together[place].upper[number], rtol=1e-9, atol=1e-9)


class TestColumns:
    def test_chosen_neurons_are_gathered_and_added(self):
        neurons = Neurons((1, 2), (torch.Size([3]), torch.Size([2, 2])))
        chosen = torch.tensor([[1, 0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
        columns = Columns.of(neurons, chosen)
        assert columns.sizes == (2, 1) and columns.real.tolist() == [[True, True, True], [True, False, False]]
        values = torch.arange(14.0).reshape(2, 7)
        gathered = columns.gathered(values, -1.0)
        assert gathered.tolist() == [[0.0, 2.0, 5.0], [8.0, -1.0, -1.0]]
        back = columns.added(torch.where(chosen, 0.0, values), gathered)
        assert torch.equal(back, values)

    def test_none_chosen_and_no_neurons(self):
        neurons = Neurons((1,), (torch.Size([3]),))
        columns = Columns.of(neurons, torch.zeros(2, 3, dtype=torch.bool))
        assert columns.real.shape == (2, 0) and columns.gathered(torch.ones(2, 4, 3), 0.0).shape == (2, 4, 0)
        assert Columns.of(Neurons((), ()), torch.zeros(2, 0, dtype=torch.bool)).real.shape == (2, 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_ascents_over_unstable_neurons_are_those_over_all(self, kind):
        problem = a_problem(1, kind)
        known = known_of(problem)
        rows, offsets = known.rows_of(problem.specification)
        neurons = Neurons.of(known.network)
        lower, upper = neurons.ends(known.bounds, known.rows)
        sub = Subproblems(problem.region, rows, offsets, lower, upper)
        slopes = starting_slopes(lower, upper, rows.shape[1])
        columns = Columns.of(neurons, (lower < 0) & (upper > 0))
        whole = maximise(known.network, sub, slopes, steps=5)
        some = maximise(known.network, sub, columns.gathered(slopes, 0.0), columns=columns, steps=5)
        torch.testing.assert_close(some.best, whole.best, rtol=1e-9, atol=1e-9)

    def test_a_neuron_without_a_column_keeps_a_sound_slope(self):
        """LeakyReLU's slopes begin at its kink: 0 would be below the function left of 0."""
        problem = a_problem(2, "leaky")
        known = known_of(problem)
        rows, offsets = known.rows_of(problem.specification)
        lower, upper = Neurons.of(known.network).ends(known.bounds, known.rows)
        sub = Subproblems(problem.region, rows, offsets, lower, upper)
        none = Columns.of(Neurons.of(known.network), torch.zeros_like(lower, dtype=torch.bool))
        found = maximise(known.network, sub, lower.new_zeros(len(lower), rows.shape[1], 0), columns=none, steps=3)
        for point in points_of(problem):
            values = problem.specification.values(known.network(point))
            assert (found.best <= values + 1e-9).all()

    def test_what_is_done_leaves_and_the_rest_goes_on_as_alone(self):
        problem = a_problem(3, "conv", count=4)
        known = known_of(problem)
        rows, offsets = known.rows_of(problem.specification)
        lower, upper = Neurons.of(known.network).ends(known.bounds, known.rows)
        sub = Subproblems(problem.region, rows, offsets, lower, upper)
        slopes = starting_slopes(lower, upper, rows.shape[1])
        done = torch.tensor([True, False, True, False])
        found = maximise(known.network, sub, slopes, steps=6, done=lambda best: done)
        plain, first = (maximise(known.network, sub, slopes, steps=steps) for steps in (6, 0))
        torch.testing.assert_close(found.best[~done], plain.best[~done], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.best[done], first.best[done], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.forms[~done], plain.forms[~done], rtol=1e-6, atol=1e-9)


class TestGains:
    @pytest.mark.parametrize("kind", KINDS)
    def test_no_half_rises_by_more(self, kind):
        compared = close = 0
        for seed in range(4):
            problem = a_problem(seed, kind, epsilon=0.2)
            space = SignSpace(problem, known_of(problem))
            roots = space.restored(space.roots())
            if not len(roots):
                continue
            columns = space.columns.take(roots.image)
            sub = space.linear(roots)
            found = maximise(space.network, sub, roots.alphas, roots.betas, columns=columns, steps=0, with_values=True)
            row = found.best.argmax(1)
            negative, positive = gains(found, space.kinks, roots.lower, roots.upper, row)
            splitter, each = SignSplitter(space, Search()), torch.arange(len(row))
            for column in range(columns.real.shape[1]):
                split = replace(roots, branch=torch.full_like(row, column))
                unstable = (roots.lower[:, column] < 0) & (roots.upper[:, column] > 0)
                halves = splitter._halves(split)  # positive, negative
                for half, gain in zip(halves, (positive, negative), strict=True):
                    half = space.clamped(half)
                    again = maximise(
                        space.network, space.linear(half), half.alphas, half.betas, columns=columns, steps=0
                    )
                    rise = again.best[each, row] - found.best[each, row]
                    assert (rise <= gain[:, column] + 1e-9)[unstable].all()
                    compared += int(unstable.sum())
                    close += int((rise - gain[:, column]).abs()[unstable].lt(1e-9).sum())
        assert compared > 20 and close > 0


def a_search(problem, search, **kwargs):
    judge = Judge()
    known = known_of(problem)
    return split_neurons(
        problem, known, known.network, search, 600.0, lambda number, point: judge(problem, number, point), **kwargs
    )


class TestWork:
    def test_a_search_without_a_limit_repeats_exactly(self):
        problem = hard_problem()
        first, second = (a_search(problem, Search(batch=4, most=12)) for _ in range(2))
        assert torch.equal(first.lower, second.lower) and first.reasons == second.reasons
        counts = [[one.record() for one in found.statistics] for found in (first, second)]
        assert counts[0] == counts[1] and any(one["splits"] >= 12 for one in counts[0])

    def test_neurons_are_tightened_once_and_only_where_the_search_has_cost_as_much(self, monkeypatch):
        asked, original = [], SignSpace.tighten

        def watched(self, images, steps, clip):
            asked.extend(images.tolist())
            return original(self, images, steps, clip)

        monkeypatch.setattr(SignSpace, "tighten", watched)
        problem = hard_problem()
        found = a_search(problem, Search(batch=4, programs=0))
        assert asked and len(set(asked)) == len(asked)  # once an image
        asked.clear()
        a_search(problem, Search(batch=4, programs=0, root_steps=0))
        assert not asked
        monkeypatch.setattr(room, "tightening_work", lambda *_: torch.full((3,), 1e30).double())  # nothing reaches it
        a_search(problem, Search(batch=4, programs=0))
        assert not asked
        assert found.lower.shape == (3,)

    def test_tightened_neurons_bound_open_subproblems_too(self):
        problem = hard_problem()
        space = SignSpace(problem, known_of(problem))
        roots = space.restored(space.roots())
        before = SignBounder(space, Search(root_steps=0), recording=False).bound(roots).subproblems.bound
        space.tighten(torch.arange(3), 5)
        after = SignBounder(space, Search(root_steps=0), recording=False).bound(roots).subproblems.bound
        assert (after >= before - 1e-9).all() and (after > before + 1e-6).any()

    def test_linear_programs_are_solved_where_few_neurons_are_open(self, monkeypatch):
        solved, original = [], room.solve_leaf

        def watched(network, region, rows, offsets, lower, upper, signs):
            solved.append(int(((lower < 0) & (upper > 0) & (signs == 0)).sum()))
            return original(network, region, rows, offsets, lower, upper, signs)

        monkeypatch.setattr(room, "solve_leaf", watched)
        problem = hard_problem()
        for programs in (0, 3, 1000):
            solved.clear()
            a_search(problem, Search(programs=programs, most=12))
            assert all(count <= programs for count in solved)
        assert solved
