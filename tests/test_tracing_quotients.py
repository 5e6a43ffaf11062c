"""Constants over computed values, and torch.max and torch.min, as models write them."""

import pytest
import torch
from networks import Apply
from torch import nn
from walking import walk

from certtrain.bounds import Interval, UnsupportedOperation, compute_bounds, trace
from certtrain.bounds.operations import Maximum, MaxPool, Reciprocal

SHIFT = torch.tensor([3.0, -1.0, 0.5])
FORWARDS = {
    "a number over a value": lambda m, x: 2 / (m.first(x).relu() + 1),
    "a buffer over a value": lambda m, x: m.shift / (m.first(x).relu() + 1),
    "torch.div": lambda m, x: torch.div(m.shift, m.first(x).relu() + 1),
    "larger of two": lambda m, x: torch.max(m.first(x), m.second(x)),
    "smaller of two, named": lambda m, x: torch.min(m.first(x), other=m.second(x)),
    "values by name": lambda m, x: m.first(x).unflatten(1, (3, 1)).max(2).values,
    "values by number": lambda m, x: torch.max(m.rows(x).unflatten(1, (3, 2)), 2)[0],
    "smallest, kept": lambda m, x: m.rows(x).unflatten(1, (3, 2)).min(dim=2, keepdim=True)[0].flatten(1),
}


def model(forward):
    torch.manual_seed(0)
    found = Apply(forward, first=nn.Linear(4, 3), second=nn.Linear(4, 3), rows=nn.Linear(4, 6))
    found.register_buffer("shift", SHIFT)
    return found.eval()


@walk("name", FORWARDS)
def test_values_and_bounds(name):
    network, x = model(FORWARDS[name]), torch.rand(5, 4)
    kinds = {type(operation) for operation in trace(network).operations}
    assert kinds & {Reciprocal, MaxPool, Maximum}
    torch.testing.assert_close(trace(network)(x), network(x))
    box = compute_bounds(network, Interval.box(x, 0.2))
    for _ in range(20):
        inside = (x + 0.2 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        assert box.contains(network(inside), 1e-6).all()


@walk("forward", [
    lambda m, x: torch.max(m.rows(x).unflatten(1, (3, 2)), 2)[1].float(),
    lambda m, x: m.rows(x).unflatten(1, (3, 2)).max(2).indices.float(),
])  # fmt: skip
def test_places_are_refused(forward):
    with pytest.raises(UnsupportedOperation, match="found the places of extreme entries; accepted: their values"):
        trace(model(forward))
