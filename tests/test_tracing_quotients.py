"""Constants over computed values, torch.max and torch.min, masks, and layers as functions."""

import subprocess
import sys

import pytest
import torch
from networks import Apply
from torch import nn
from walking import walk

from certtrain.bounds import Interval, UnsupportedOperation, compute_bounds, trace
from certtrain.bounds.operations import Convolution, Maximum, MaxPool, Reciprocal, Scale

SHIFT = torch.tensor([3.0, -1.0, 0.5])
FORWARDS = {
    "a number over a value": lambda m, x: 2 / (m.first(x).relu() + 1),
    "a buffer over a value": lambda m, x: m.shift / (m.first(x).relu() + 1),
    "torch.div": lambda m, x: torch.div(m.shift, m.first(x).relu() + 1),
    "larger of two": lambda m, x: torch.max(m.first(x), m.second(x)),
    "smaller of two, named": lambda m, x: torch.min(m.first(x), other=m.second(x)),
    "values by name": lambda m, x: m.first(x).unflatten(1, (3, 1)).max(2).values,
    "values by number": lambda m, x: torch.max(m.rows(x).unflatten(1, (3, 2)), 2)[0],
    "chosen by a mask": lambda m, x: torch.where(m.mask, m.first(x), m.second(x)),
    "a number by a mask": lambda m, x: torch.where(m.mask, m.first(x), 0.5),
    "a value by a mask": lambda m, x: torch.where(m.mask, m.shift, m.second(x)),
    "filled": lambda m, x: m.first(x).masked_fill(m.mask, -1.5),
    "convolved": lambda m, x: torch.nn.functional.conv2d(
        x.view(-1, 1, 2, 2), m.kernels, m.shift, padding=(1, 0), stride=(2, 1)
    ).flatten(1),
    "convolved rows": lambda m, x: torch.nn.functional.conv1d(x.view(-1, 1, 4), m.rows_kernel).flatten(1),
    "smallest, kept": lambda m, x: m.rows(x).unflatten(1, (3, 2)).min(dim=2, keepdim=True)[0].flatten(1),
}


def model(forward):
    torch.manual_seed(0)
    found = Apply(forward, first=nn.Linear(4, 3), second=nn.Linear(4, 3), rows=nn.Linear(4, 6))
    found.register_buffer("shift", SHIFT)
    found.register_buffer("mask", torch.tensor([True, False, True]))
    found.kernels, found.rows_kernel = nn.Parameter(torch.randn(3, 1, 2, 2)), nn.Parameter(torch.randn(3, 1, 2))
    return found.eval()


@walk("name", FORWARDS)
def test_values_and_bounds(name):
    network, x = model(FORWARDS[name]), torch.rand(5, 4)
    kinds = {type(operation) for operation in trace(network, x.shape[1:]).operations}
    assert kinds & {Reciprocal, MaxPool, Maximum, Scale, Convolution}
    torch.testing.assert_close(trace(network)(x), network(x))
    box = compute_bounds(network, Interval.box(x, 0.2))
    for _ in range(20):
        inside = (x + 0.2 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        assert box.contains(network(inside), 1e-6).all()


def test_functions_train_their_weights():
    network, x = model(FORWARDS["convolved"]), torch.rand(5, 4)
    compute_bounds(network, Interval.box(x, 0.2)).upper.sum().backward()
    assert network.kernels.grad is not None and network.kernels.grad.abs().max() > 0


def test_rules_do_not_depend_on_what_else_is_imported():
    program = (
        "import certtrain.bounds; from certtrain.bounds.operations.registry import FUNCTIONS; known = set(FUNCTIONS); "
        "import certtrain.verifiers.onnx_operators; assert set(FUNCTIONS) == known, set(FUNCTIONS) - known"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


MASKS = {
    "a computed condition": lambda m, x: torch.where(m.first(x), m.first(x), m.second(x)),
    "two constants": lambda m, x: m.first(x) + torch.where(m.mask, 1.0, 2.0),
    "a computed weight": lambda m, x: torch.nn.functional.conv2d(x.view(-1, 1, 2, 2), m.rows(x).view(-1, 1, 2, 2)),
}


@walk("name", MASKS)
def test_other_choices_are_refused(name):
    with pytest.raises(UnsupportedOperation, match=r"found .*; accepted: "):
        trace(model(MASKS[name]), torch.Size([4]))


@walk("forward", [
    lambda m, x: torch.max(m.rows(x).unflatten(1, (3, 2)), 2)[1].float(),
    lambda m, x: m.rows(x).unflatten(1, (3, 2)).max(2).indices.float(),
    lambda m, x: m.rows(x).unflatten(1, (3, 2)).max(2).relu(),
])  # fmt: skip
def test_places_are_refused(forward):
    with pytest.raises(UnsupportedOperation, match="found the places of extreme entries; accepted: their values"):
        trace(model(forward))
