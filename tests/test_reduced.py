"""Reduced networks: over their box they are the network, and bounds over them are the bounds over the whole one."""

from dataclasses import replace

import pytest
import torch
from planted import KINDS
from test_tighter_bounds import a_problem, a_search, hard_problem, known_of, points_of

from certtrain.bounds.rounding import REAL
from certtrain.verifiers import Search, neuron_split, sign_space
from certtrain.verifiers import reduced as room
from certtrain.verifiers.neuron_split import Ascents, SignBounder
from certtrain.verifiers.neurons import Neurons
from certtrain.verifiers.sign_space import SignSpace


@pytest.fixture(autouse=True)
def _without_gradients(monkeypatch):
    monkeypatch.setattr(room, "FASTER", 1e9)
    with torch.no_grad():
        yield


def reductions(problem):
    known = known_of(problem)
    space = SignSpace(problem, known)
    for image in range(len(problem)):
        at = torch.tensor([image])
        bounds = known.subset(at).bounds
        small = room.reduced(known.network, space.region.take(at), bounds, space.columns.take(at))
        if small is not None:
            yield image, space, small


class TestOverTheBox:
    @pytest.mark.parametrize("kind", KINDS)
    def test_outputs_and_unstable_neurons_are_those_of_the_network(self, kind):
        met = 0
        for seed in range(4):
            problem = a_problem(seed, kind)
            for image, space, small in reductions(problem):
                whole, neurons = space.network, Neurons.of(small.network)
                for point in points_of(problem, 50):
                    one = point[image : image + 1]
                    values, own = whole.values(one), small.network.values(one.flatten(1))
                    torch.testing.assert_close(own[-1].flatten(1), values[-1].flatten(1), rtol=1e-9, atol=1e-9)
                    flat = space.neurons.together(
                        {p: values[whole.operations[p].inputs[0]] for p in space.neurons.places}
                    )
                    mine = neurons.together({p: own[small.network.operations[p].inputs[0]] for p in neurons.places})
                    columns = space.columns.neurons[image, small.columns]
                    torch.testing.assert_close(mine, flat[:, columns], rtol=1e-9, atol=1e-9)
                    met += len(columns)
        assert met > 50

    def test_without_unstable_neurons_or_where_it_is_larger_there_is_none(self, monkeypatch):
        problem = a_problem(0, "dense", epsilon=1e-9)
        assert not list(reductions(problem))
        problem = a_problem(0, "dense")
        assert list(reductions(problem))
        monkeypatch.setattr(room, "FASTER", 1e-3)
        assert not list(reductions(problem))


class TestSearch:
    @pytest.mark.parametrize("kind", KINDS)
    def test_ascents_over_it_are_those_over_the_whole(self, kind):
        compared = 0
        for seed in range(4):
            problem = a_problem(seed, kind)
            known = known_of(problem)
            whole, small = SignSpace(problem, known), SignSpace(problem, known)
            small.reduced = {image: own for image, _, own in reductions(problem)}
            roots = whole.restored(whole.roots())
            if not len(roots):
                continue
            for steps in (6, 0):  # steps of Adam turn a gradient's rounding errors into whole steps of no effect
                search = Search(root_steps=0, steps=steps)
                found, other = (SignBounder(space, search, recording=False).bound(roots) for space in (whole, small))
                torch.testing.assert_close(other.subproblems.bound, found.subproblems.bound, rtol=1e-7, atol=1e-7)
            real = whole.columns.take(roots.image).real.unsqueeze(1)
            for name in ("alphas", "betas", "reached", "values"):
                mine, theirs = (getattr(one.optimised, name).where(real, 0.0) for one in (other, found))
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
            for name in ("forms", "constants"):
                mine, theirs = (getattr(one.optimised, name) for one in (other, found))
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
            compared += len(roots)
        assert compared > 2

    def test_it_is_used_and_finds_the_same(self, monkeypatch):
        monkeypatch.setattr(
            neuron_split, "tightening_work", lambda network, *_: torch.full((3,), 1e-9, dtype=torch.float64)
        )
        used, original = list[int](), Ascents._over

        def watched(self, network, *arguments):
            used.append(network is not self.space.network)
            return original(self, network, *arguments)

        monkeypatch.setattr(Ascents, "_over", watched)
        problem = hard_problem()
        with_it = a_search(problem, Search(batch=4))
        assert sum(used) > 0.5 * len(used)
        monkeypatch.setattr(sign_space, "reduced", lambda *_: None)
        without = a_search(problem, Search(batch=4))
        assert with_it.proved.all() and without.proved.all()

    def test_exact_arithmetic_goes_without(self):
        problem = hard_problem()
        space = SignSpace(problem, known_of(problem, REAL))
        space.tighten(torch.arange(3), 1)
        assert not space.reduced and space.lines
        space = SignSpace(problem, known_of(problem))
        space.tighten(torch.arange(3), 1)
        assert set(space.reduced) == {0, 1, 2}


def test_images_with_and_without_share_a_batch():
    problem = replace(hard_problem())
    known = known_of(problem)
    space = SignSpace(problem, known)
    roots = space.restored(space.roots())
    plain = SignBounder(space, Search(root_steps=0), recording=False).bound(roots).subproblems
    at = torch.tensor([1])
    space.reduced = {
        1: room.reduced(known.network, space.region.take(at), known.subset(at).bounds, space.columns.take(at))
    }
    mixed = SignBounder(space, Search(root_steps=0), recording=False).bound(roots).subproblems
    assert torch.equal(mixed.image, plain.image)
    torch.testing.assert_close(mixed.bound, plain.bound, rtol=1e-7, atol=1e-7)
