"""The memory of a search over boxes: its open list, and the sets whose bounds are tightened together."""

from dataclasses import replace

import pytest
import torch
from problems import alone, unknown
from torch import nn

from certtrain.bounds import Box, memory
from certtrain.bounds.crown import crown_bounds
from certtrain.verifiers import InputSplitStage, Problem, Specification, box_bounds
from certtrain.verifiers.box_bounds import BoxBounds
from certtrain.verifiers.input_split import BoxBounder, PackedBoxes


@torch.no_grad()
def a_problem(seed: int) -> Problem:
    """Images of 36 pixels, of which two or three vary, not the same ones in each; the least of 2,000 points' margins is
    0.05."""
    torch.manual_seed(seed)
    layers = [nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    model = nn.Sequential(nn.Flatten(), *layers).eval()
    images, wide = torch.rand(4, 1, 6, 6), torch.zeros(4, 36)
    for number in range(4):
        wide[number, torch.randperm(36)[: 2 + number % 2]] = 0.6
    radius = wide.reshape(images.shape)
    for layer in layers[::2]:
        layer.weight *= 3
    points = images + radius * (2 * torch.rand(2000, *images.shape) - 1)
    robust = Specification.robust(model(images).argmax(1), 3)
    least = torch.stack([robust.worst(robust.values(model(point))) for point in points]).amin(0)
    specification = replace(robust, offsets=robust.offsets + (0.05 - least).unsqueeze(1))
    return Problem(model, Box(images - radius, images + radius), specification, torch.arange(4))


@pytest.mark.parametrize("seed", range(4))
def test_a_search_with_packed_boxes_ends_alike(seed, monkeypatch):
    problem, packed = a_problem(seed), list[PackedBoxes]()
    expected = alone(InputSplitStage(batch=4), problem)
    whole, restored = BoxBounder.packed, BoxBounder.restored

    def pack(self, some):
        found = whole(self, some)
        again = restored(self, found)
        assert all(torch.equal(getattr(some, name), getattr(again, name)) for name in vars(some))
        packed.append(found)
        return found

    monkeypatch.setattr(BoxBounder, "packed", pack)
    monkeypatch.setattr(memory, "_installed", lambda: 8)  # one whole box
    found = alone(InputSplitStage(batch=4), problem)
    assert found.statuses == expected.statuses and None not in found.statuses
    torch.testing.assert_close(found.lower, expected.lower)
    assert {boxes.lower.shape[1:] for boxes in packed} == {(3,)} and len(packed) > 1


@torch.no_grad()
def test_sets_are_tightened_together_as_far_as_they_fit(monkeypatch):
    problem, calls, original = a_problem(0), list[int](), box_bounds.tightened

    def counted(network, region, *rest):
        calls.append(len(region))
        return original(network, region, *rest)

    monkeypatch.setattr(box_bounds, "tightened", counted)
    known, whole, found = unknown(problem), problem.region, []
    rows, offsets = known.forms_of(problem.specification)
    for size in (memory.ROUND, 1):
        monkeypatch.setattr(memory, "ROUND", size)
        given = crown_bounds(known.network, whole)
        bounds = BoxBounds(known.network, rows, offsets, torch.tensor([[0], [1]]), given, whole, tighten=True)
        bounds._spent[:3] = torch.inf
        bounds(whole.take(torch.arange(2)), torch.arange(2))
        found.append([end for place in sorted(given) for end in (bounds.outer[place].lower, bounds.outer[place].upper)])
        assert any(not torch.equal(ends.lower, bounds.outer[place].lower) for place, ends in given.items())
    assert calls == [3, 1, 1, 1]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
