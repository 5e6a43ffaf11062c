"""Products, quotients, matrix products, reductions and softmax: their bounds by sampling, corners and switches."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import Apply
from test_new_operation import assert_bounded
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import Bounds, Interval, LinfBall, UnsupportedOperation, compute_bounds
from certtrain.bounds.operations import (
    LogSoftmax,
    LogSumExp,
    MatrixProduct,
    Operation,
    Power,
    Product,
    Quotient,
    Softmax,
)
from certtrain.bounds.operations.rows import Along
from certtrain.bounds.relaxation import InputLines


def rows(m, h: Tensor) -> Tensor:
    return 3 * m.a(h).view(h.size(0), 3, 4)


FORWARDS = {
    "product": lambda m, h: m.a(h) * m.b(h),
    "product in place": lambda m, h: m.a(h).mul_(m.b(h)),
    "square": lambda m, h: torch.square(m.a(h)) + (y := m.b(h)) * y,
    "product that widens": lambda m, h: (rows(m, h) * m.b(h).view(h.size(0), 12, 1)[:, :3]).flatten(1),
    "sum that widens": lambda m, h: (rows(m, h) - m.b(h).view(h.size(0), 12, 1)[:, :3]).flatten(1),
    "constant that widens": lambda m, h: (m.a(h).view(h.size(0), 12, 1) * m.c - m.c).flatten(1),
    "quotient": lambda m, h: m.a(h) / (torch.sigmoid(m.b(h)) + 0.5),
    "negative quotient": lambda m, h: m.a(h) / (-1.0 * torch.sigmoid(m.b(h)) - 0.5),
    "matrices": lambda m, h: (m.a(h).view(h.size(0), 3, 4) @ m.b(h).view(h.size(0), 4, 3)).flatten(1),
    "batches of matrices": lambda m, h: torch.matmul(
        m.a(h).view(h.size(0), 3, 2, 2), m.b(h).view(h.size(0), 1, 2, 6)[:, :, :, :3]).flatten(1),
    "matrix and its own": lambda m, h: torch.bmm(y := m.a(h).view(h.size(0), 2, 6)[:, :, :2], y).flatten(1),
    "mean": lambda m, h: rows(m, h).mean(1),
    "sum": lambda m, h: m.a(h).view(h.size(0), 3, 2, 2).sum((1, -1), keepdim=True).flatten(1),
    "largest": lambda m, h: m.a(h).view(h.size(0), 3, 2, 2).amax((1, -1)),
    "smallest": lambda m, h: rows(m, h).amin(1, keepdim=True).flatten(1),
    "larger": lambda m, h: torch.maximum(m.a(h), m.b(h)),
    "smaller": lambda m, h: torch.minimum(rows(m, h), m.b(h).view(h.size(0), 3, 4)[:, :1]).flatten(1),
    "softmax": lambda m, h: rows(m, h).softmax(-1).flatten(1),
    "softmax of columns": lambda m, h: F.softmax(rows(m, h), dim=1).flatten(1),
    "log_softmax": lambda m, h: F.log_softmax(rows(m, h), dim=1).flatten(1),
    "logsumexp": lambda m, h: torch.logsumexp(rows(m, h), (1, 2), keepdim=True).flatten(1),
}  # fmt: skip


def head(forward) -> nn.Module:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(64, 12), "b": nn.Linear(64, 12), "c": torch.randn(1, 1, 3)}
    width = forward(Apply(forward, **layers), torch.rand(2, 64)).shape[1]
    return Apply(lambda m, x: m.last(F.leaky_relu(forward(m, x.flatten(1)), 0.1)), **layers, last=nn.Linear(width, 3))


@walk("name", FORWARDS)
def test_bounds_enclose_a_network_with_it(name):
    model = head(FORWARDS[name]).double().eval()
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    for epsilon in (0.0, 1e-3, 0.05, 0.5):
        assert_bounded(model, images, epsilon)


@walk("name", FORWARDS)
def test_networks_with_it_train(name):
    """The loss over a box falls, and gradients reach the first layer."""
    model, images, labels = head(FORWARDS[name]).train(), torch.rand(6, 1, 8, 8), torch.randint(0, 3, (6,))
    losses, optimizer = [], torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        bounds = compute_bounds(model, LinfBall(0.01).region(images))
        loss = F.cross_entropy(
            bounds.upper.scatter(1, labels[:, None], bounds.lower.gather(1, labels[:, None])), labels
        )
        loss.backward()
        assert model.a.weight.grad is not None
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def along(kind, dim=-1):
    return kind("here", (0,), Along(dim, "here"))


ENDS = (-200.0, -41.0, -39.0, -3.0, -1.0, -1e-3, 0.0, 1e-7, 0.5, 2.0, 39.0, 41.0, 200.0)
OF_TWO = {"product": Product("here", (0, 0)), "quotient": Quotient("here", (0, 0))}
OF_ROWS = {"softmax": along(Softmax), "log_softmax": along(LogSoftmax), "logsumexp": along(LogSumExp)}


def boxes(count: int, dtype: torch.dtype) -> list[Bounds]:
    """Boxes (N, 1) between any two of ``ENDS``, for ``count`` inputs, in another order for each."""
    pairs = torch.tensor([pair for pair in itertools.combinations_with_replacement(ENDS, 2)], dtype=dtype)
    pairs = pairs.repeat(4, 1)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(pairs), generator=generator) for _ in range(count)]
    return [Bounds(*(pairs[order][:, [end]] for end in (0, 1))) for order in orders]


def points(box: list[Bounds], count: int = 40) -> list[list[Tensor]]:
    """All corners of up to four inputs, the middle, and points inside."""
    found = []
    shares = [*itertools.product((0.0, 1.0), repeat=len(box))] if len(box) <= 5 else []
    for share in [*shares, (0.5,) * len(box), *torch.rand(count, len(box)).tolist()]:
        inside = [x.lower * (1 - s) + x.upper * s for x, s in zip(box, share)]
        found.append([torch.maximum(x.lower, torch.minimum(at, x.upper)) for x, at in zip(box, inside)])
    return found


def assert_enclosed(operation: Operation, bounds: list[Bounds], at: list[list[Tensor]], alpha=None) -> None:
    """Interval, lines backward and lines forward contain the operation's float64 values and those of the dtype."""
    dtype = bounds[0].lower.dtype
    interval = operation.interval(*(x.interval() for x in bounds))
    relaxation = operation.relax(*bounds, alpha=alpha)
    for inputs in at:
        for value in (operation(*inputs).double(), operation(*(x.double() for x in inputs))):
            known = value.isfinite()
            slack = torch.finfo(dtype).eps * value.abs()
            assert ((interval.lower.double() - slack <= value) & (value <= interval.upper.double() + slack))[
                known
            ].all()
            count = value[0].numel()
            forms = torch.cat([torch.eye(count, dtype=dtype), -torch.eye(count, dtype=dtype)])
            forms = forms.reshape(1, 2 * count, *value.shape[1:]).expand(len(value), -1, *value.shape[1:])
            (parts, constants) = relaxation.backward(forms, torch.zeros(len(value), 2 * count, dtype=dtype))
            bound = constants.double() + sum(
                (part.double() * x.double().unsqueeze(1)).flatten(2).sum(-1) for part, x in zip(parts, inputs)
            )
            wanted = (forms.double() * value.unsqueeze(1)).flatten(2).sum(-1)
            far = known.flatten(1).repeat(1, 2)
            assert not (bound > wanted)[far].any()
            one = [torch.stack([torch.zeros_like(x), x], 1) for x in inputs]
            lines = relaxation.forward(*(InputLines(x, x) for x in one))
            terms = [(part.abs() * x.abs().unsqueeze(1)).flatten(1).amax(1).double() for part, x in zip(parts, inputs)]
            size = 1 + value.abs() + sum(terms).reshape(-1, *[1] * (value.ndim - 1))
            room = (1e-12 if dtype == torch.float64 else 1e-5) * size
            assert (lines.lower[:, -1].double() <= value + room)[known].all()
            assert (lines.upper[:, -1].double() >= value - room)[known].all()


@walk("dtype", [torch.float32, torch.float64])
@walk("name", OF_TWO)
@walk("alpha", [None, 0.0, 0.3, 1.0])
def test_planes_around_every_switch(name, dtype, alpha):
    bounds = boxes(2, dtype)
    alpha = None if alpha is None else torch.full_like(bounds[0].lower, alpha)
    assert_enclosed(OF_TWO[name], bounds, points(bounds, 20), alpha)


@walk("dtype", [torch.float32, torch.float64])
@walk("name", OF_ROWS)
@walk("width", [1, 2, 5])
def test_lines_of_rows_around_every_switch(name, dtype, width):
    parts = boxes(width, dtype)
    bounds = Bounds(torch.cat([x.lower for x in parts], 1), torch.cat([x.upper for x in parts], 1))
    at = [[torch.cat(inputs, 1)] for inputs in points(parts, 20)]
    assert_enclosed(OF_ROWS[name], [bounds], at)


@walk("alpha", [None, 0.0, 0.3, 1.0])
def test_matrix_planes(alpha):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 2, *shape, generator=generator) for shape in ((3, 4), (4, 2)))
    ends = [Bounds(v - r, v + r) for v, r in ((x, torch.rand_like(x)), (y, torch.rand_like(y)))]
    operation = MatrixProduct("here", (0, 0))
    alpha = None if alpha is None else torch.full((50, 2, 3, 2), alpha)
    relaxation, box = operation.relax(*ends, alpha=alpha), operation.interval(*(end.interval() for end in ends))
    forms = torch.randn(50, 3, 2, 3, 2, generator=generator)
    parts, constants = relaxation.backward(forms, torch.zeros(50, 3))
    for share in (0.0, 1.0, None):
        a, b = (
            e.lower
            + (torch.rand_like(e.lower) if share is None else (torch.rand_like(e.lower) > 0.5).float())
            * (e.upper - e.lower)
            for e in ends
        )
        bound = constants + sum((part * v.unsqueeze(1)).flatten(2).sum(-1) for part, v in zip(parts, (a, b)))
        assert (bound <= (forms * (a @ b).unsqueeze(1)).flatten(2).sum(-1) + 1e-4).all()
        assert box.contains(a @ b, 1e-4).all()


def test_intervals_are_exact():
    """At corners of the box that no smaller interval holds."""
    torch.manual_seed(0)
    x, y = (Interval(torch.randn(7, 4, dtype=torch.float64), torch.rand(7, 4, dtype=torch.float64)) for _ in range(2))
    corners = torch.stack([a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)])
    product, exact = Product("here", (0, 0)).interval(x, y), (corners.amin(0), corners.amax(0))
    matrix = MatrixProduct("here", (0, 0)).interval(
        Interval(x.center.unsqueeze(1), x.radius.unsqueeze(1)), Interval(y.center.unsqueeze(2), y.radius.unsqueeze(2))
    )
    torch.testing.assert_close((product.lower, product.upper), exact)
    torch.testing.assert_close(matrix.lower.flatten(), exact[0].sum(1))
    torch.testing.assert_close(matrix.upper.flatten(), exact[1].sum(1))
    for operation in OF_ROWS.values():
        found = operation.interval(x)
        low, high = torch.full((2, *found.center.shape), torch.inf, dtype=torch.float64)
        high = -high
        for share in itertools.product((0.0, 1.0), repeat=4):
            value = operation(x.lower + torch.tensor(share, dtype=torch.float64) * 2 * x.radius)
            low, high = torch.minimum(low, value), torch.maximum(high, value)
        torch.testing.assert_close((found.lower, found.upper), (low, high), rtol=0, atol=1e-12)


def test_large_matrices_are_bounded_in_parts(monkeypatch):
    torch.manual_seed(0)
    x, y = (Interval(torch.randn(2, 5, 5), torch.rand(2, 5, 5)) for _ in range(2))
    whole = MatrixProduct("here", (0, 0)).interval(x, y)
    monkeypatch.setattr("certtrain.bounds.operations.matrix_product.PRODUCTS", 1)
    parts = MatrixProduct("here", (0, 0)).interval(x, y)
    torch.testing.assert_close((whole.center, whole.radius), (parts.center, parts.radius))


def test_a_divisor_that_may_be_zero_gives_no_bound():
    x, y = Interval(torch.ones(1, 3), torch.ones(1, 3)), Interval(torch.tensor([[0.0, 1, -2]]), torch.ones(1, 3))
    found = Quotient("here", (0, 0)).interval(x, y)
    assert found.lower[0, :2].isinf().all() and found.upper[0, :2].isinf().all() and found.radius[0, 2] < 10
    planes = Quotient("here", (0, 0)).relax(x.bounds(), y.bounds())
    assert (
        planes.lower.constant.isneginf().tolist() == planes.upper.constant.isposinf().tolist() == [[True, True, False]]
    )
    _, constants = planes.backward(torch.eye(3).reshape(1, 3, 3), torch.zeros(1, 3))
    assert not (constants > -torch.inf).any()  # NaN, which proves nothing


def test_a_square_is_no_product_of_two():
    x = Interval(torch.zeros(1, 1), torch.ones(1, 1))
    assert Power("here", (0,), 2.0).interval(x).lower > -1e-6


def test_a_softmax_over_the_batch_is_refused():
    with pytest.raises(UnsupportedOperation, match="behind the batch"):
        along(Softmax, 0)(torch.rand(2, 3))
