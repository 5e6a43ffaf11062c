"""Norms by a row's own statistics: values as torch computes them, bounds by sampling and around every switch."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import Apply
from test_new_operation import assert_bounded
from test_products import assert_enclosed, boxes, points
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import Bounds, Interval, LinfBall, Network, UnsupportedOperation, compute_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import Centering, CenteringOnce, Input, RowNorm
from certtrain.bounds.operations.rows import LastOnes
from certtrain.bounds.relaxation import InputLines


def randomised(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def called(function, size: int = 0) -> nn.Module:
    weight = {"weight": nn.Parameter(torch.ones(size))} if size else {}
    return Apply(function, **weight, bias=torch.rand(size))


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
    "F.layer_norm": (lambda: called(lambda m, x: F.layer_norm(x, (8,), m.weight, m.bias), 8), (4, 8)),
    "F.layer_norm without weight": (
        lambda: called(lambda m, x: F.layer_norm(x, x.shape[2:], bias=m.weight), 8),
        (4, 8),
    ),
    "F.rms_norm": (lambda: called(lambda m, x: F.rms_norm(x, (8,), weight=m.weight, eps=0.01), 8), (4, 8)),
    "F.group_norm": (lambda: called(lambda m, x: F.group_norm(x, 2, m.weight, m.bias), 4), (4, 2, 4)),
    "plain F.group_norm": (lambda: called(lambda m, x: F.group_norm(x, num_groups=4, eps=0.1)), (4, 8)),
    "F.instance_norm": (lambda: called(lambda m, x: F.instance_norm(x, weight=m.weight, bias=m.bias), 4), (4, 2, 4)),
    "norm": (lambda: called(lambda m, x: x / (1 + x.norm(dim=-1, keepdim=True))), (4, 8)),
    "vector norm": (
        lambda: called(lambda m, x: x / (1 + torch.linalg.vector_norm(x, dim=(1, 2))[:, None, None])),
        (4, 8),
    ),
    "Frobenius norm": (lambda: called(lambda m, x: x / (1 + torch.linalg.norm(x, "fro", (1, 2), True))), (4, 8)),
    "standard deviation": (lambda: called(lambda m, x: x / (0.5 + x.std(-1, keepdim=True))), (4, 8)),
    "variance": (
        lambda: called(lambda m, x: x + x.var((1, 2), correction=3, keepdim=True)),
        (8, 4),
    ),
    "biased variance": (lambda: called(lambda m, x: x + torch.var(x, 1, unbiased=False, keepdim=True)), (4, 8)),
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
@walk("mean, eps, floor", [(True, 1e-5, 0.0), (False, 1e-5, 0.0), (True, 1.0, 0.0), (False, 0.0, 1e-12),
                           (False, 0.0, 0.5)])  # fmt: skip
@walk("width", [1, 2, 4])
def test_lines_around_every_switch(mean, eps, floor, width, dtype):
    parts = boxes(width, dtype)
    bounds = Bounds(torch.cat([x.lower for x in parts], 1), torch.cat([x.upper for x in parts], 1))
    at = [[torch.cat(inputs, 1)] for inputs in points(parts, 10)]
    squares, scaled = RowNorm("here", (0,), LastOnes(1), eps, mean, floor).parts(0)
    network = Network((Input("input", ()), squares, replace(scaled, inputs=(0, 1))))
    assert_enclosed(squares, [bounds], at)
    interval = squares.interval(bounds.interval()).bounds()
    lines = {1: squares.relax(bounds), 2: scaled.relax(bounds, interval)}
    forms = torch.cat([torch.eye(width, dtype=dtype), -torch.eye(width, dtype=dtype)]).expand(
        len(parts[0].lower), -1, -1
    )
    (through, of_squares), constants = lines[2].backward(forms, forms.new_zeros(forms.shape[:2]))
    (more,), constants = lines[1].backward(of_squares, constants)
    box = scaled.interval(bounds.interval(), interval.interval())
    for (x,) in at:
        below, above = (InputLines(*[torch.stack([torch.zeros_like(v), v], 1)] * 2) for v in (x, squares(x)))
        ahead = lines[2].forward(below, above)
        for value in (network(x).double(), network(x.double())):
            known = value.isfinite()
            bound = constants.double() + ((through + more).double() * x.double().unsqueeze(1)).sum(-1)
            wanted = (forms.double() * value.unsqueeze(1)).sum(-1)
            assert not (bound > wanted)[known.repeat(1, 2)].any()
            slack = torch.finfo(dtype).eps * value.abs()
            inside = (box.lower.double() - slack <= value) & (value <= box.upper.double() + slack)
            assert inside[known & box.radius.isfinite()].all()
            room = (1e-12 if dtype == torch.float64 else 1e-5) * (
                1 + value.abs() + x.double().abs() / (floor or eps**0.5)
            )
            assert ((ahead.lower[:, -1] <= value + room) & (ahead.upper[:, -1] >= value - room))[known].all()


@walk("mean", [True, False])
def test_sizes_of_squares_and_of_what_they_divide(mean):
    squares, scaled = RowNorm("here", (0,), LastOnes(1), 1e-5, mean).parts(0)
    huge, x = torch.full((1, 8), 1e25), torch.randn(500, 8)
    assert squares.peak(huge).isinf().all()  # rows of numbers whose squares overflow
    assert (scaled.magnitude(x.abs(), squares.peak(x.abs())) >= scaled(x, squares(x)).abs()).all()
    assert (scaled.magnitude(huge, squares(huge)) <= 3).all()


@walk("floor", [1e-3, 0.5])
def test_lines_of_floored_norms(floor):
    """Rows far above the floor, around it, and of zeros."""
    torch.manual_seed(0)
    norm = RowNorm("here", (0,), LastOnes(1), 0.0, False, floor)
    squares, scaled = norm.parts(0)
    size = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.1, 1.5, 3.0, 100.0], dtype=torch.float64) * floor
    center = torch.randn(30, 8, 5, dtype=torch.float64)
    center = center / center.norm(dim=-1, keepdim=True) * size[:, None]
    x = Interval(center, torch.rand_like(center) * size[:, None].clamp(min=floor / 9) * torch.rand(30, 1, 1).double())
    bounds, q = x.bounds(), squares.interval(x)
    planes, lines = scaled.relax(bounds, q.bounds()), squares.relax(bounds)
    mixed = scaled.relax(bounds, q.bounds(), alpha=torch.rand_like(center))
    box, whole = scaled.interval(x, q), norm.interval(x)
    forms = torch.cat([torch.eye(40), -torch.eye(40)]).double().reshape(1, 80, 8, 5).expand(30, -1, -1, -1)
    for share in (*torch.rand(6), -1.0, 1.0):
        point = center + x.radius * (share if abs(share) == 1 else 2 * torch.rand_like(center) - 1)
        with_floor, without = norm(point), F.normalize(point, dim=-1, eps=1e-300)
        torch.testing.assert_close(with_floor, F.normalize(point, dim=-1, eps=floor))
        for value in (with_floor, without):
            for ends in (box, whole):
                assert (ends.lower <= value + 1e-12).all() and (value <= ends.upper + 1e-12).all()
            for relaxation in (planes, mixed):
                (through, of_squares), constants = relaxation.backward(forms, forms.new_zeros(30, 80))
                (more,), constants = lines.backward(of_squares, constants)
                bound = constants + ((through + more) * point.unsqueeze(1)).flatten(2).sum(-1)
                assert (bound <= (forms * value.unsqueeze(1)).flatten(2).sum(-1) + 1e-12).all()


def euclidean(**options) -> nn.Module:
    """Rows of eight, some of them close to 0, divided by their norms."""
    torch.manual_seed(0)
    factors = torch.tensor([1.0, 1e-2, 1e-6, 1.0]).reshape(4, 1)
    return Apply(
        lambda m, x: m.last(F.normalize(m.first(x.flatten(1)).view(x.size(0), 4, 8) * m.factors, **options).flatten(1)),
        first=nn.Linear(64, 32), last=nn.Linear(32, 3), factors=factors,
    )  # fmt: skip


@walk("options", [{"dim": -1}, {"dim": 1, "eps": 1e-3}, {"p": 2, "dim": 2, "eps": 5.0}])
def test_euclidean_norms(options):
    model, images = euclidean(**options).eval(), torch.rand(3, 1, 8, 8)
    images[0] = 0
    torch.testing.assert_close(fold(model, images.shape[1:])(images), model(images), rtol=0, atol=1e-6)
    for epsilon in (0.0, 1e-3, 0.05):
        assert_bounded(model.double(), images.double(), epsilon)


@walk("options, words", [({"p": 1}, "p=1"), ({"dim": (1, 2)}, "dim="), ({"eps": 0.0}, "eps=0.0")])
def test_other_norms_are_refused(options, words):
    with pytest.raises(UnsupportedOperation, match=f"normalize at 'normalize': found.*{words}.*; accepted: "):
        compute_bounds(euclidean(**options).eval(), Interval.box(torch.rand(2, 1, 8, 8), 0.1))


@walk("dtype", [torch.float32, torch.float64])
def test_rows_minus_their_means_are_enclosed_with_float32s_roundings(dtype):
    torch.manual_seed(0)
    operation = CenteringOnce("here", (0,), LastOnes(1))
    center = torch.cat([torch.randn(20, 1, 1) * 1000 + torch.zeros(20, 2, 48), torch.randn(20, 2, 48)]).to(dtype)
    x = Interval(center, torch.rand(40, 2, 1, dtype=dtype).expand_as(center) * 1e-5)
    at = [[(x.center + x.radius * (2 * torch.rand_like(center) - 1)).to(dtype)] for _ in range(20)]
    assert_enclosed(operation, [Bounds(x.lower, x.upper)], at)
    found = operation.interval(x)
    for (point,) in at:
        for order in (torch.arange(48), torch.randperm(48)):
            total = point[..., 0].float() * 0
            for place in order:
                total = total + point[..., place].float()
            value = point.float() - (total / 48).unsqueeze(-1)
            inside = (found.lower.double() <= value.double()) & (value.double() <= found.upper.double())
            assert inside[:20].all()  # points of the rest are rounded to float32 on their way


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
