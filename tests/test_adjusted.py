"""Free parameters of relaxations: sound for any values, the defaults at 1/2, and bounds that gain by them."""

import pytest
import torch
from activation_kinds import by_name
from scalar_functions import ROWS, Row
from test_crown import inside, make_region, random_forms, values_of
from test_optimise import frozen, subproblems
from test_products import along, boxes
from test_scalar_functions import DTYPES, SMOOTH, intervals, points
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import Bounds, LinfBall
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.operations import Entrywise, MatrixProduct, Product, Quotient, Softmax
from certtrain.bounds.relaxation import Lines
from certtrain.verifiers.optimise import maximise, starting_slopes

GATED = ["tanh", "sigmoid", "gelu", "gelu_tanh", "silu"]
OF_SEVERAL = {
    "product": (Product("here", (0, 0)), (1,), 2), "quotient": (Quotient("here", (0, 0)), (1,), 2),
    "softmax": (along(Softmax), (3,), 1), 
}  # fmt: skip


def function(name: str) -> tuple[Entrywise, Row]:
    if name in GATED:
        return by_name(name), Row(None, switches=(0.0, -0.75, 1.41, -1.28, 2.4), above=-torch.inf)
    operation = ROWS[name].operation
    assert isinstance(operation, Entrywise)
    return operation, ROWS[name]


def parameters(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random ones: ends, middles, and some outside [0, 1]."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return torch.where(draw < 0.2, 0.0, torch.where(draw > 0.8, 1.0, (draw - 0.5) * 2 + 0.5))


ADJUSTABLE = [name for name in (*SMOOTH, *GATED) if function(name)[0].adjustable]


@walk("name", ADJUSTABLE)
@walk("dtype", DTYPES)
def test_lines_of_any_parameters_enclose_what_is_computed(name, dtype):
    """Without any tolerance."""
    activation, row = function(name)
    lower, upper = intervals(row, dtype, 60)
    lower, upper = lower[:: 1 + len(lower) // 1000], upper[:: 1 + len(upper) // 1000]
    x = points(row, lower, upper)
    value = activation(x).double().unsqueeze(1)
    bounds = Bounds(lower, upper)
    lines = activation.relax(bounds, alpha=parameters(len(lower), 6, 1, dtype=dtype))
    default, half = activation.relax(bounds), activation.relax(bounds, alpha=torch.full_like(lower, 0.5))
    assert isinstance(lines.lower_intercept, Tensor)
    known = value.isfinite().all(2) & (value.abs().amax(2) < torch.finfo(dtype).max / 1e6)
    known = (known & (upper - lower < torch.finfo(dtype).max)).expand(-1, lines.upper_slope.shape[1])
    below, above = (
        (slope.double() * x.double().unsqueeze(1) + intercept.double())
        for slope, intercept in (
            (lines.lower_slope, lines.lower_intercept), (lines.upper_slope, lines.upper_intercept)
        )
    )  # fmt: skip
    assert not (below > value)[known].any() and not (above < value)[known].any()
    for own, wanted in zip(ends_of(half), ends_of(default), strict=True):
        assert torch.equal(own.nan_to_num(), wanted.nan_to_num())


def ends_of(lines: Lines) -> tuple[Tensor, ...]:
    assert lines.lower_intercept is not None
    return lines.lower_slope, lines.upper_slope, lines.lower_intercept, lines.upper_intercept


@walk("name", ADJUSTABLE)
def test_the_gradient_is_that_of_the_line(name):
    """Of the lines' values at a point, by central differences."""
    activation, row = function(name)
    lower, upper = row.above if row.above > -1 else -2.3, 1.7
    start = torch.tensor([[lower + 0.3, 0.6, lower + 0.2]], dtype=torch.float64)
    bounds = Bounds(start, torch.tensor([[0.7, upper, upper]], dtype=torch.float64).maximum(start + 0.5))
    at = bounds.lower + 0.3 * (bounds.upper - bounds.lower)
    alpha = torch.tensor([[[0.2, 0.3, 0.8]]], dtype=torch.float64, requires_grad=True)

    def heights(alpha: Tensor) -> tuple[Tensor, Tensor]:
        lines = activation.relax(bounds, alpha=alpha)
        assert lines.lower_intercept is not None
        return lines.lower_slope * at + lines.lower_intercept, lines.upper_slope * at + lines.upper_intercept

    for side in (0, 1):
        (slope,) = torch.autograd.grad(heights(alpha)[side].sum(), alpha)
        with torch.no_grad():
            step = (heights(alpha + 1e-3)[side] - heights(alpha - 1e-3)[side]) / 2e-3
        torch.testing.assert_close(slope, step, rtol=5e-3, atol=2e-3)


@walk("name", OF_SEVERAL)
@walk("dtype", DTYPES)
def test_planes_of_any_parameters_enclose_the_function(name, dtype):
    operation, shape, count = OF_SEVERAL[name]
    width = shape[0] * count
    parts = boxes(width, dtype)
    lower, upper = (torch.cat([getattr(x, end) for x in parts], 1) for end in ("lower", "upper"))
    bounds = [Bounds(*ends) for ends in zip(lower.split(shape[0], 1), upper.split(shape[0], 1), strict=True)]
    forms = torch.randn(len(lower), 6, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    relaxation = operation.relax(*bounds, alpha=parameters(len(lower), 6, *shape, dtype=dtype))
    through, constants = relaxation.backward(forms, torch.zeros(len(lower), 6, dtype=dtype))
    for share in (0.0, 1.0, 0.5, *torch.rand(30).tolist()):
        mixed = torch.rand(lower.shape).to(dtype) if share not in (0.0, 1.0) else torch.full_like(lower, share)
        mixed = torch.where(torch.rand(lower.shape) < 0.5, mixed.round(), mixed)
        at = torch.minimum(torch.maximum(lower * (1 - mixed) + upper * mixed, lower), upper).split(shape[0], 1)
        value = operation(*(x.double() for x in at))
        bound = constants.double() + sum(
            (part.double() * x.double().unsqueeze(1)).flatten(2).sum(-1) for part, x in zip(through, at, strict=True)
        )
        wanted = (forms.double() * value.unsqueeze(1)).flatten(2).sum(-1)
        assert not (bound > wanted)[value.isfinite().all(1)].any()


def test_matrix_planes_of_any_parameters():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 2, *shape, generator=generator) for shape in ((3, 4), (4, 2)))
    ends = [Bounds(v - r, v + r) for v, r in ((x, torch.rand_like(x)), (y, torch.rand_like(y)))]
    operation, forms = MatrixProduct("here", (0, 0)), torch.randn(50, 5, 2, 3, 2, generator=generator)
    alpha = parameters(50, 5, 2, 3, 2, dtype=torch.float32)
    adjusted = operation.adjusted(operation.relax(*ends), ends, alpha)
    through, constants = adjusted.backward(forms, torch.zeros(50, 5))
    for number in range(40):
        share = [torch.rand_like(e.lower).round() if number % 2 else torch.rand_like(e.lower) for e in ends]
        at = [e.lower + s * (e.upper - e.lower) for e, s in zip(ends, share, strict=True)]
        bound = constants + sum((p * v.unsqueeze(1)).flatten(2).sum(-1) for p, v in zip(through, at, strict=True))
        assert (bound <= (forms * (at[0] @ at[1]).unsqueeze(1)).flatten(2).sum(-1) + 1e-4).all()


class Mixed(nn.Module):
    """Functions behind a linear map, with a ReLU before and behind."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.relu = function, nn.ReLU()
        self.first, self.second, self.last = nn.Linear(72, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.relu(self.first(x.flatten(1))))
        return self.last(self.relu(self.function(x)))


def attended(x: Tensor) -> Tensor:
    rows = x.reshape(x.shape[0], 4, 3)
    return (torch.softmax(rows @ rows.transpose(1, 2), -1) @ rows).reshape(x.shape[0], 12)


FUNCTIONS = {
    "product": lambda x: x * x.flip(1), "quotient": lambda x: x / (x.flip(1).exp() + 1), "attention": attended,
    "exp": torch.exp, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": nn.functional.gelu,
    "softplus": nn.functional.softplus, "erf": torch.erf, "layer norm": nn.LayerNorm(12), "pow": lambda x: (x + 1) ** 2,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ascents_gain_by_them(monkeypatch, name):
    region = make_region(LinfBall(0.3))
    model = Mixed(FUNCTIONS[name]).double()
    network = frozen(model, region)
    forms, bounds = random_forms(network), crown_bounds(network, region)
    start = bound_forms(network, region, forms, bounds)
    sub = subproblems(network, region, forms, bounds)
    slopes = starting_slopes(sub.lower, sub.upper, forms.shape[1])
    plain = maximise(network, sub, slopes, steps=0)
    torch.testing.assert_close(plain.best, start, rtol=1e-9, atol=1e-9)
    found = maximise(network, sub, slopes, steps=20)
    smooth = [p for p in network.nonlinear if not network.nonlinear_at(p).piecewise_linear]
    assert any(network.nonlinear_at(p).adjustable for p in smooth)
    for place in smooth:
        monkeypatch.setattr(type(network.nonlinear_at(place)), "adjustable", False)
    without = maximise(network, sub, slopes, steps=20)
    assert (found.best >= plain.best).all()
    assert (found.best - plain.best).mean() > (without.best - plain.best).mean() + 1e-4
    for point in inside(model, region):
        assert (found.best <= values_of(forms, network(point)) + 1e-9).all()


@walk("width", [2, 3, 5])
def test_shares_of_wide_boxes(width):
    """Differences around and beyond those at which exponentials are cut off; without any tolerance."""
    generator = torch.Generator().manual_seed(0)
    middle = 45 * (2 * torch.rand(2000, width, generator=generator, dtype=torch.float64) - 1)
    radius = 40 * torch.rand(2000, width, generator=generator, dtype=torch.float64) ** 3
    bounds, softmax = Bounds(middle - radius, middle + radius), along(Softmax)
    forms = torch.cat([torch.eye(width), -torch.eye(width), torch.randn(4, width, generator=generator)]).double()
    forms = forms.expand(2000, -1, -1)
    (through,), constants = softmax.relax(bounds).backward(forms, torch.zeros(2000, len(forms[0]), dtype=torch.float64))
    for number in range(60):
        share = torch.rand(2000, width, generator=generator, dtype=torch.float64)
        share = share.round() if number % 2 else share**4
        x = torch.minimum(bounds.lower + 2 * radius * share, bounds.upper)
        bound = constants + (through * x.unsqueeze(1)).sum(-1)
        assert not (bound > (forms * softmax(x).unsqueeze(1)).sum(-1)).any()
