"""Norms by a row's own statistics: values as torch computes them, bounds by sampling and around every switch."""

import itertools

import pytest
import torch
from networks import Apply
from test_new_operation import assert_bounded
from test_products import assert_enclosed, boxes, points
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import Bounds, Interval, LinfBall, UnsupportedOperation, compute_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import Centering, RowNorm
from certtrain.bounds.operations.rows import LastOnes


def randomised(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


NORMS = {
    "layer norm": (lambda: nn.LayerNorm(8), (4, 8)),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((4, 8)), (4, 8)),
    "layer norm without bias": (lambda: nn.LayerNorm(8, bias=False, eps=0.1), (4, 8)),
    "plain layer norm": (lambda: nn.LayerNorm(32, elementwise_affine=False), (32,)),
    "layer norm of one": (lambda: nn.LayerNorm(1), (32, 1)),
    "rms norm": (lambda: nn.RMSNorm(8, eps=1e-3), (4, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 2, 4)),
    "plain group norm": (lambda: nn.GroupNorm(2, 4, affine=False), (4, 8)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 2, 4)),
    "plain instance norm": (lambda: nn.InstanceNorm1d(4), (4, 8)),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    build, shape = NORMS[name]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Unflatten(1, shape), randomised(build()), nn.Flatten(),
                         nn.LeakyReLU(0.1), nn.Linear(32, 3))  # fmt: skip


def with_norm(name: str) -> nn.Module:
    layers, shape = list(network(name)), NORMS[name][1]
    return Apply(lambda m, x: m.after(m.norm(m.before(x).view(x.size(0), *shape))),
                 before=nn.Sequential(*layers[:2]), norm=layers[3], after=nn.Sequential(*layers[4:]))  # fmt: skip


@walk("name", NORMS)
def test_bounds_enclose_a_network_with_it(name):
    model = with_norm(name).double().eval()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    for epsilon in (0.0, 1e-3, 0.05, 0.5):
        assert_bounded(model, images, epsilon)


@walk("name", NORMS)
def test_values_are_those_of_torch(name):
    model, images = with_norm(name).eval(), torch.rand(5, 1, 8, 8)
    images[0] = 0.5
    torch.testing.assert_close(fold(model, images.shape[1:])(images), model(images), rtol=0, atol=3e-6)


def test_a_constant_row_gives_the_bias():
    """Not 1e-2 off, as the chain of operators that files below opset 17 spell out."""
    layer, x = randomised(nn.LayerNorm(48)), torch.full((2, 48), 1234.567)
    model = nn.Sequential(nn.Identity(), layer).eval()
    torch.testing.assert_close(fold(model, x.shape[1:])(x), layer.bias.expand(2, -1), rtol=0, atol=1e-6)


@walk("name", [name for name in NORMS if name != "layer norm of one"])
def test_networks_with_it_train(name):
    model, images, labels = with_norm(name).train(), torch.rand(6, 1, 8, 8), torch.randint(0, 3, (6,))
    losses, optimizer = [], torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        bounds = compute_bounds(model, LinfBall(1e-3).region(images))
        worst = bounds.upper.scatter(1, labels[:, None], bounds.lower.gather(1, labels[:, None]))
        loss = nn.functional.cross_entropy(worst, labels)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@walk("dtype", [torch.float32, torch.float64])
@walk("mean, eps", [(True, 1e-5), (False, 1e-5), (True, 1.0)])
@walk("width", [1, 2, 4])
def test_lines_around_every_switch(mean, eps, width, dtype):
    parts = boxes(width, dtype)
    bounds = Bounds(torch.cat([x.lower for x in parts], 1), torch.cat([x.upper for x in parts], 1))
    at = [[torch.cat(inputs, 1)] for inputs in points(parts, 10)]
    assert_enclosed(RowNorm("here", (0,), LastOnes(1), eps, mean), [bounds], at)


def test_intervals_are_exact():
    torch.manual_seed(0)
    x = Interval(torch.randn(9, 3, dtype=torch.float64), torch.rand(9, 3, dtype=torch.float64))
    for operation in (RowNorm("here", (0,), LastOnes(1), 0.1), Centering("here", (0,), LastOnes(1))):
        found = operation.interval(x)
        low = torch.full((9, 3), torch.inf, dtype=torch.float64)
        high = -low
        # corners, and 0 for the entries whose squares are smallest inside
        ends = [x.lower, x.upper, torch.zeros_like(x.lower).clamp(x.lower, x.upper)]
        for choice in itertools.product(range(3), repeat=3):
            point = torch.stack([ends[end][:, place] for place, end in enumerate(choice)], 1)
            value: Tensor = operation(point)
            low, high = torch.minimum(low, value), torch.maximum(high, value)
        torch.testing.assert_close((found.lower, found.upper), (low, high), rtol=0, atol=1e-12)


@walk("make, shape, words", [
    (lambda: nn.GroupNorm(2, 4), (4, 8), "3 dimensions"),
    (lambda: nn.RMSNorm(8), (4, 8), "eps=None"),
    (lambda: nn.LayerNorm(8, eps=0.0), (4, 8), "eps=0"),
    (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (4, 8), "track_running_stats"),
])  # fmt: skip
def test_refusals_name_what_was_found(make, shape, words):
    model = nn.Sequential(nn.Identity(), make()).eval()
    with pytest.raises(UnsupportedOperation, match=f"1: found {words}.*accepted: "):
        compute_bounds(model, Interval.box(torch.rand(2, *shape), 0.1))
