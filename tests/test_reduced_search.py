"""Searches over reduced networks: the memory these take, when they are used, and what the whole one confirms."""

from dataclasses import replace

import pytest
import torch
from test_tighter_bounds import a_search, hard_problem, known_of

from certtrain.bounds import Bounds, memory
from certtrain.verifiers import Search, engine
from certtrain.verifiers import neuron_split as room
from certtrain.verifiers import reduced as reducing
from certtrain.verifiers.engine import in_turns
from certtrain.verifiers.neuron_split import Ascents, SignBounder
from certtrain.verifiers.sign_space import SignSpace


@pytest.fixture(autouse=True)
def _without_gradients(monkeypatch):
    monkeypatch.setattr(reducing, "FASTER", 1e9)
    with torch.no_grad():
        yield


@pytest.fixture
def at_once(monkeypatch):
    """Images have reduced networks from the first subproblem on."""
    work = room.tightening_work
    monkeypatch.setattr(room, "tightening_work", lambda *arguments: work(*arguments) / 1e9)


def tightened_space(steps=1):
    problem = hard_problem()
    space = SignSpace(problem, known_of(problem))
    space.tighten(torch.arange(3), steps)
    return space


class TestMemory:
    def test_no_network_is_made_that_needs_more_room(self):
        problem = hard_problem()
        known, at = known_of(problem), torch.tensor([0])
        space = SignSpace(problem, known)
        given = known.network, space.region.take(at), known.subset(at).bounds, space.columns.take(at)
        small = reducing.reduced(*given)
        assert small is not None and small.nbytes > 1000
        assert reducing.reduced(*given, room=small.nbytes) is not None
        assert reducing.reduced(*given, room=small.nbytes - 1) is None

    def test_all_of_a_batch_share_the_room(self, monkeypatch):
        most = max(small.nbytes for small in tightened_space().reduced.values())
        monkeypatch.setattr(memory, "kept", lambda like: 2 * int(1.5 * most))
        assert list(tightened_space().reduced) == [0]

    def test_images_without_open_subproblems_are_released(self):
        space = tightened_space()
        assert set(space.reduced) == set(space.lines) == {0, 1, 2}
        space.release(torch.tensor([2, 0, 2]))
        assert set(space.reduced) == set(space.lines) == {0, 2}
        space.release(torch.zeros(0, dtype=torch.int64))
        assert not space.reduced and not space.lines

    def test_a_search_ends_without_any(self, at_once, monkeypatch):
        spaces, start = list[SignSpace](), SignSpace.__init__

        def watched(self, *arguments):
            start(self, *arguments)
            spaces.append(self)

        monkeypatch.setattr(SignSpace, "__init__", watched)
        found = a_search(hard_problem(), Search(batch=1))
        assert found.proved.all() and len(spaces) == 1
        assert len(spaces[0].reduced) <= 1  # the others ended before the last round

    def test_rounds_of_reduced_images_are_larger(self, monkeypatch):
        space = tightened_space()
        together = {space.network: 7, **{small.network: 50 + image for image, small in space.reduced.items()}}
        monkeypatch.setattr(room, "ascents_at_a_time", lambda network, rows, like: together[network])
        bounder, roots = SignBounder(space, Search(root_steps=0), recording=False), space.roots()
        assert bounder.at_a_time == 7
        for images, most in (([0, 1, 2], 50), ([1, 2], 51)):
            bounder.prepare(roots.take(torch.isin(roots.image, torch.tensor(images))))
            assert bounder.at_a_time == most
        del space.reduced[1]
        bounder.prepare(roots)
        assert bounder.at_a_time == 7


def test_networks_whose_bounds_are_not_known_are_not_reduced():
    problem = hard_problem()
    known, at = known_of(problem), torch.tensor([0])
    space = SignSpace(problem, known)
    bounds, place = dict(known.subset(at).bounds), known.network.nonlinear[1]
    for end in ("lower", "upper"):
        ends = bounds[place].lower.clone(), bounds[place].upper.clone()
        ends[end == "upper"][0, 0] = torch.nan
        given = {**bounds, place: Bounds(*ends)}
        assert reducing.reduced(known.network, space.region.take(at), given, space.columns.take(at)) is None


class TestUse:
    def chosen(self, space, *counts):
        images = torch.cat([torch.full((count,), image) for image, count in enumerate(counts)])
        roots = space.restored(space.roots())
        first = torch.stack([(roots.image == image).nonzero()[0, 0] for image in images])
        return Ascents(space, 6, 0.1, with_values=True)._chosen(roots.take(first))

    def test_images_of_few_subproblems_share_the_whole_network(self, monkeypatch):
        space = tightened_space()
        each = Ascents(space, 6, 0.1, with_values=True)._work
        monkeypatch.setattr(room, "OVERHEAD", 4 * each)
        assert [len(index) for _, index in self.chosen(space, 1)] == [1]  # by itself: as over the whole network
        assert [len(index) for _, index in self.chosen(space, 2, 2, 3)] == [2, 2, 3]  # would save 5 and cost 8
        assert not self.chosen(space, 1, 1, 1)
        assert [len(index) for _, index in self.chosen(space, 1, 9, 5)] == [1, 9, 5]
        del space.reduced[2]
        assert [len(index) for _, index in self.chosen(space, 1, 9, 5)] == [9]
        assert [len(index) for _, index in self.chosen(space, 4, 9, 5)] == [4, 9]
        monkeypatch.setattr(memory, "planned", lambda like: 1)
        assert [len(index) for _, index in self.chosen(space, 1, 9, 5)] == [1, 9]  # the whole network takes no more

    def test_bounds_are_the_same(self, monkeypatch):
        space = tightened_space()
        roots, ascents = space.restored(space.roots()), Ascents(space, 0, 0.1, with_values=True)
        small = ascents(roots)
        monkeypatch.setattr(room, "OVERHEAD", 1e30)
        del space.reduced[0]
        whole = ascents(roots)
        for name in ("best", "forms", "constants", "reached"):
            torch.testing.assert_close(getattr(small, name), getattr(whole, name), rtol=1e-7, atol=1e-7)

    def test_looking_ahead_goes_over_reduced_networks_too(self, at_once):
        found = a_search(hard_problem(), Search(batch=4, candidates=3, programs=0))
        assert found.proved.all()


class TestPoints:
    def test_outputs_are_those_of_the_network(self):
        space = tightened_space()
        del space.reduced[1]
        roots = space.restored(space.roots())
        bounded = SignBounder(space, Search(root_steps=0), recording=False).bound(roots)
        index = torch.arange(len(roots)).flip(0)
        (points,) = bounded.points(index)
        outputs = bounded.outputs(space.network, index, points)
        torch.testing.assert_close(outputs, space.network(points), rtol=1e-9, atol=1e-9)

    def test_only_the_real_network_refutes(self, at_once, monkeypatch):
        asked, outputs = list[int](), room.SignBounds.outputs

        def lying(self, network, index, points):
            asked.append(len(points))
            return -1e3 * outputs(self, network, index, points)

        monkeypatch.setattr(room.SignBounds, "outputs", lying)
        found = a_search(hard_problem(), Search(batch=4))
        assert asked and found.proved.all() and found.counterexamples == [None] * 3


class TestMost:
    @pytest.mark.parametrize(("most", "batch"), [(1, 256), (3, 256), (5, 2)])
    def test_no_image_is_split_more_often(self, most, batch):
        problem = hard_problem()
        found = a_search(problem, Search(batch=batch, most=most, programs=0))
        splits = [one.splits for one in found.statistics]
        assert max(splits) == most
        for count, reason, proved in zip(splits, found.reasons, found.proved, strict=True):
            assert (reason == f"{most} splits") == (not proved) and (proved or count == most)

    def test_an_image_that_its_last_split_proves_is_proved(self):
        problem = hard_problem()
        needed = [one.splits for one in a_search(problem, Search(programs=0)).statistics]
        found = a_search(problem, Search(programs=0, most=max(needed)))
        assert found.proved.all() and [one.splits for one in found.statistics] == needed

    def test_turns_end_where_an_image_has_no_more(self):
        image, bound = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
        assert in_turns(image, bound, 9, torch.tensor([1, 2])).tolist() == [1, 5, 4]
        assert in_turns(image, bound, 2, torch.tensor([3, 0])).tolist() == [1, 2]
        assert in_turns(image, bound, 9, torch.tensor([3, 3])).tolist() == [1, 5, 2, 4, 0, 3]


def test_rounds_are_filled_with_few_images_which_take_turns(monkeypatch):
    had, skipped = [0, 0, 0], 0

    def watched(image, bound, most, each):
        nonlocal skipped
        waiting = [own for own in range(3) if (image == own).any() and not each[own]]
        taken = [own for own in range(3) if each[own]]
        assert all(had[one] <= had[other] for one in taken for other in waiting)
        assert not waiting or sum(int(each[own]) for own in taken) >= most
        chosen = in_turns(image, bound, most, each)
        assert set(image[chosen].tolist()) == set(taken) or len(chosen) == most
        for own in set(image[chosen].tolist()):
            had[own] += 1
        skipped += len(waiting)
        return chosen

    monkeypatch.setattr(engine, "in_turns", watched)
    found = a_search(hard_problem(), Search(batch=4, programs=0))
    assert found.proved.all() and [one.rounds for one in found.statistics] == had and skipped > 3


def test_clipped_fields_are_those_of_the_images_with_lines():
    """Subproblems of other images, and closed ones, stay as they are; what was given is not changed in place."""
    space = tightened_space(steps=4)
    del space.lines[1]
    roots = space.restored(space.roots())
    bounded = SignBounder(space, Search(root_steps=0), recording=False).bound(roots).subproblems
    forms = torch.ones(len(roots), 4, dtype=torch.float64)
    some = replace(bounded, level=torch.full_like(bounded.level, torch.inf))
    kept = {name: getattr(some, name).clone() for name in ("bound", "signs", "lower", "upper", "level")}
    after = space.clipped(some, forms, -forms[:, 0], torch.ones_like(some.signs, dtype=torch.bool))
    assert all(torch.equal(getattr(some, name), values) for name, values in kept.items())
    others = some.image == 1
    assert others.any() and after.level[others].isinf().all() and after.level[~others].isfinite().all()
