"""Functions of one number: ranges and lines around every switch, gradients, torch, onnxruntime, certificates."""

import math

import numpy as np
import pytest
import torch
from networks import specification
from onnx import TensorProto, helper, numpy_helper
from scalar_functions import CURVES, ROWS, SLOPES, Row, function
from torch import Tensor, nn
from walking import walk

import certtrain
from certtrain.bounds import Bounds, Interval, LinfBall, UnsupportedOperation, compute_bounds
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import ScalarCurve
from certtrain.bounds.operations.row_statistics import RootOfSquares
from certtrain.errors import InputError
from certtrain.verifiers import Certify
from certtrain.verifiers.onnx_network import read_onnx, replay_session

DTYPES = [torch.float32, torch.float64]
SMOOTH = [name for name, row in CURVES.items() if isinstance(row.operation, ScalarCurve)]
TRACED = [name for name, row in ROWS.items() if row.layers]
READ = [name for name, row in ROWS.items() if row.op]


def entrywise(row: Row) -> ScalarCurve:
    assert isinstance(row.operation, ScalarCurve)
    return row.operation


def intervals(row: Row, dtype: torch.dtype, count: int = 150) -> tuple[Tensor, Tensor]:
    """(N, 1) ends: random ones, and within a few ulps of every switch, of all widths."""
    draw = torch.Generator().manual_seed(0)
    some = 4 * torch.randn(count, generator=draw, dtype=torch.float64)
    small = 10 ** (8 * torch.rand(count, generator=draw, dtype=torch.float64) - 7)
    places = torch.tensor([*row.switches, *(-s for s in row.switches), 0.1, -0.1, 3.0, -3.0, 15.0, -15.0, 60.0, -60.0])
    places = places.double().repeat_interleave(5).to(dtype)
    steps = torch.arange(-2, 3).repeat(len(places) // 5)
    for far in (0, 1):
        moved = torch.nextafter(places, torch.where(steps > 0, torch.inf, -torch.inf).to(dtype))
        places = torch.where(steps.abs() > far, moved, places)
    fixed = torch.cat([torch.meshgrid(places, places, indexing="ij")[side].reshape(1, -1) for side in (0, 1)])
    one = torch.cat([fixed[0], some.to(dtype), some.to(dtype), places, places])
    two = torch.cat([fixed[1], some.flip(0).to(dtype), (some + small).to(dtype),
                     places + some[torch.arange(len(places)) % count].to(dtype),
                     places + small[torch.arange(len(places)) % count].to(dtype)])  # fmt: skip
    lower, upper = torch.minimum(one, two), torch.maximum(one, two)
    kept = lower > row.above if row.above == 0 else lower >= row.above
    return lower[kept].unsqueeze(1), upper[kept].unsqueeze(1)


def points(row: Row, lower: Tensor, upper: Tensor) -> Tensor:
    """(N, P) numbers of each interval in its dtype: even ones, ever nearer ones to its ends, and all switches."""
    share = torch.cat([torch.linspace(0, 1, 41), torch.logspace(-9, -2, 8)]).double()
    wide = upper.double() - lower.double()
    parts = [lower.double() + wide * share, upper.double() - wide * share]
    near = [s + d for s in row.switches for d in (-1e-3, -1e-6, 0.0, 1e-6, 1e-3)]
    x = torch.cat([*parts, torch.tensor(near).double() + 0 * wide], 1).to(lower.dtype)
    return torch.minimum(torch.maximum(x, lower), upper)


@walk("name", SMOOTH)
@walk("dtype", DTYPES)
def test_ranges_and_lines_enclose_what_is_computed(name, dtype):
    """Without any tolerance."""
    row = ROWS[name]
    activation = entrywise(row)
    lower, upper = intervals(row, dtype)
    x = points(row, lower, upper)
    value = activation(x).double()
    box = activation.interval(Interval.from_bounds(lower, upper))
    lines = activation.relax(Bounds(lower, upper))
    assert isinstance(lines.lower_intercept, Tensor)
    known = value.isfinite().all(1) & (value.abs().amax(1) < torch.finfo(dtype).max / 1e6)
    known &= box.radius.isfinite().squeeze(1) | (row.above != 0)  # rounded outward it may reach below 0
    assert known.float().mean() > 0.6
    center, radius = box.center.double(), box.radius.double()
    assert ((value >= center - radius) & (value <= center + radius))[known].all()
    below = lines.lower_slope.double() * x.double() + lines.lower_intercept.double()
    above = lines.upper_slope.double() * x.double() + lines.upper_intercept.double()
    assert (below <= value)[known].all() and (value <= above)[known].all()


@walk("name", [name for name in SMOOTH if not ROWS[name].jumps])
def test_lines_are_nearly_as_close_as_lines_can_be(name):
    """At the middle: the envelope there is the least chord between points on either side."""
    row = ROWS[name]
    activation = entrywise(row)
    lower, upper = intervals(row, torch.float64, 300)
    narrow = ((upper - lower) < 12) & (lower > -30) & (upper < 30) & (upper - lower > 1e-3)
    lower, upper = lower[narrow].unsqueeze(1), upper[narrow].unsqueeze(1)
    middle = (lower + upper) / 2
    lower, upper, middle = (end[:: len(end) // 100 + 1] for end in (lower, upper, middle))
    lines = activation.relax(Bounds(lower, upper))
    x = torch.cat([points(row, lower, upper)[:, 98:], lower + (upper - lower) * torch.linspace(0, 1, 101).double()], 1)
    size = activation(x).amax(1) - activation(x).amin(1)
    for sign, slope, intercept in (
        (1, lines.lower_slope, lines.lower_intercept), (-1, lines.upper_slope, lines.upper_intercept)
    ):  # fmt: skip
        value = sign * activation(x)
        left, right = x <= middle, x >= middle
        best = torch.full_like(middle, torch.inf).squeeze(1)
        for column in range(x.shape[1]):
            a, at_a = x[:, column : column + 1], value[:, column : column + 1]
            share = ((middle - a) / (x - a)).nan_to_num(0.0).clamp(0, 1)
            chord = torch.where(right & left[:, column : column + 1], at_a + share * (value - at_a), torch.inf)
            best = torch.minimum(best, chord.amin(1))
        found = sign * (slope * middle + intercept).squeeze(1)
        assert (best - found <= 0.02 * size + 1e-9).all()


@walk("name", SMOOTH)
def test_gradients_are_those_of_the_bounds(name):
    """Of ranges everywhere but at switches; of lines they are finite."""
    row = ROWS[name]
    activation = entrywise(row)
    torch.manual_seed(0)
    lower = torch.randn(200, 1, dtype=torch.float64) + (4 if row.above == 0 else 0)
    lower = lower.clamp(min=0.1) if row.above == 0 else lower
    upper = lower + torch.rand(200, 1, dtype=torch.float64)
    away = torch.stack([(end - s).abs() > 1e-3 for end in (lower, upper) for s in (*row.switches, 0.0)]).all(0)
    lower, upper = (end[away].unsqueeze(1).requires_grad_() for end in (lower, upper))
    if not row.jumps:
        assert torch.autograd.gradcheck(
            lambda a, b: (lambda ends: (ends.lower, ends.upper))(activation.image(Bounds(a, b))), (lower, upper),
            eps=1e-7, atol=1e-4,
        )  # fmt: skip
    lines = activation.relax(Bounds(lower, upper))
    total = (lines.lower_slope + lines.upper_slope + lines.upper_intercept + lines.lower_intercept).sum()
    for gradient in torch.autograd.grad(total, (lower, upper), allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@walk("name", [name for name in SMOOTH if ROWS[name].above == 0])
def test_nothing_is_known_outside_a_domain(name):
    activation = entrywise(ROWS[name])
    ends = torch.tensor([[-1.0, 1.0], [math.nan, 1.0], [0.5, math.nan], [-2.0, math.nan]]).double()
    lower, upper = ends[:, :1], ends[:, 1:]
    box, lines = activation.interval(Interval.from_bounds(lower, upper)), activation.relax(Bounds(lower, upper))
    assert box.radius.isnan().all() and lines.upper_intercept.isnan().all() and lines.lower_intercept.isnan().all()


class Net(nn.Module):
    """(B, 5) in [0, 1] → (B, 3), with the layer on numbers of either sign, or on positive ones."""

    def __init__(self, layer, above: float):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.layer = layer if isinstance(layer, nn.Module) else function(layer)
        with torch.no_grad():
            self.first.weight.mul_(3)
            if above == 0:
                self.first.weight.abs_(), self.first.bias.fill_(0.5)

    def forward(self, x):
        return self.last(self.layer(self.first(x)))


def assert_bounded(model: nn.Module, values, epsilon: float = 0.1) -> None:
    """Intervals and linear bounds enclose ``values`` of the model, a function (N, 5) → (N, 3), around three images."""
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(3, 5, generator=draw, dtype=torch.float64)
    network, region = fold(model, torch.Size([5]), dtype=torch.float64), LinfBall(epsilon).region(x)
    box = compute_bounds(model, Interval.box(x.float(), epsilon))
    forms = torch.randn(3, 4, 3, dtype=torch.float64, generator=draw)
    least = bound_forms(network, region, forms, crown_bounds(network, region))
    shares = torch.rand(300, 3, 5, generator=draw, dtype=torch.float64) * 2 - 1
    shares[::2] = shares[::2].sign()
    inside = (x + epsilon * shares).clamp(0, 1)
    found = values(inside.float().flatten(0, 1)).double().unflatten(0, (300, 3))
    size = found.abs().max().clamp(min=0.1)
    assert (box.lower - 1e-5 * size <= found).all() and (found <= box.upper + 1e-5 * size).all()
    assert (least - 1e-4 * size <= torch.einsum("brk,sbk->sbr", forms, found)).all() and least.isfinite().all()
    folded = network(x)
    torch.testing.assert_close(folded, values(x.float()).double(), rtol=0, atol=1e-5 * float(size))


@walk("name", TRACED)
def test_layers_and_functions_are_traced(name):
    row = ROWS[name]
    for layer in row.layers:
        model = Net(layer, row.above).eval().requires_grad_(False)
        assert_bounded(model, model)


OPTIONS = {
    "round": lambda x: torch.round(x, decimals=2), "clamp": lambda x: x.clamp(min=x), "pow": lambda x: x**x,
    "nan": lambda x: x.clamp(min=math.nan), "far": lambda x: x.clamp(max=1e9),
    "beta": nn.Softplus(-1.0), "elu": nn.ELU(-1.0),
}  # fmt: skip


@walk("name", OPTIONS)
def test_options_that_have_no_rule_are_named(name):
    with pytest.raises(UnsupportedOperation, match=r"found .*; accepted: ") as caught:
        compute_bounds(Net(OPTIONS[name], -1.0).eval(), Interval.box(torch.rand(1, 5), 0.1))
    assert "\n" not in str(caught.value)


def onnx_model(row: Row, opset: int):
    """The operator between two layers."""
    first = Net(nn.Identity(), row.above)
    names, weights = [], []
    for place, value in enumerate(row.inputs):
        names.append("" if value is None else f"c{place}")
        if value is not None:
            weights.append(numpy_helper.from_array(np.asarray(value), names[-1]))
    arrays = {"w": first.first.weight, "b": first.first.bias, "v": first.last.weight, "d": first.last.bias}
    weights += [numpy_helper.from_array(value.detach().numpy(), key) for key, value in arrays.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node(row.op, ["h", *names], ["g"], name="here", **row.attributes),
        helper.make_node("Gemm", ["g", "v", "d"], ["y"], transB=1),
    ]
    ends = [helper.make_tensor_value_info(key, TensorProto.FLOAT, [1, n]) for key, n in (("x", 5), ("y", 3))]
    graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def alone(row: Row, opset: int):
    """The operator alone."""
    model = onnx_model(row, opset)
    node = model.graph.node[1]
    node.input[0], node.output[0] = "x", "y"
    del model.graph.node[2], model.graph.node[0]
    kept = [weight for weight in model.graph.initializer if weight.name.startswith("c")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    return model


@walk("name", READ)
def test_operators_are_onnxruntimes(tmp_path, name):
    """On random and edge inputs, by the file's operators and with onnxruntime's optimisations."""
    row, path = ROWS[name], tmp_path / "one.onnx"
    for opset in row.opsets:
        path.write_bytes(alone(row, opset).SerializeToString())
        network = read_onnx(path)
        replay = replay_session(network.model)
        draw = torch.Generator().manual_seed(0)
        edges = torch.tensor([*row.switches, *SLOPES.tolist(), 0.5, 1.5, -2.5, 20.0, -20.0, 80.0, -80.0, 1e-30])
        edges = torch.cat([edges, *(torch.nextafter(edges, torch.tensor(far)) for far in (-9e9, 9e9))])
        x = torch.cat([edges[: len(edges) // 5 * 5].reshape(-1, 5), 3 * torch.randn(20, 5, generator=draw)])
        x = x.abs().clamp(min=1e-2) if row.above == 0 else x
        wanted = torch.stack([replay(image) for image in x])
        found = network.module(x).unsqueeze(1).expand_as(wanted)
        if row.exact:
            assert torch.equal(found, wanted)
        else:
            assert ((found - wanted).abs() <= 1e-6 * wanted.abs().clamp(min=1)).all()


@walk("name", READ)
def test_operators_have_bounds(tmp_path, name):
    row, path = ROWS[name], tmp_path / "net.onnx"
    path.write_bytes(onnx_model(row, row.opsets[-1]).SerializeToString())
    network = read_onnx(path)
    replay = replay_session(network.model)
    assert_bounded(network.module, lambda x: torch.stack([replay(image)[0] for image in x]))


@walk("name", ["abs", "relu6", "hardtanh", "clip below", "clip above", "hard sigmoid", "prelu"])
@walk("arithmetic", ["nearest", "real", "float32"])
def test_branch_and_bound_decides_what_is_piecewise_linear(name, arithmetic):
    """At a radius where the margin's minimum, found on a fine grid, is just positive, and where it is negative."""
    row = ROWS[name]
    torch.manual_seed(3)
    layer = row.layers[0] if isinstance(row.layers[0], nn.Module) else function(row.layers[0])
    layer = nn.PReLU(init=-0.4) if isinstance(layer, nn.PReLU) else layer
    model = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 4), layer, nn.Linear(4, 2)).eval().requires_grad_(False)
    for part in model:
        if isinstance(part, nn.Linear):
            part.weight.mul_(3)
    image = torch.tensor([[0.5, 0.5]])
    label = model(image).argmax(1)

    def margin(epsilon: float) -> float:
        line = torch.linspace(-epsilon, epsilon, 161)
        grid = image + torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
        logits = model(grid)
        return float((specification(label, 2).float() @ logits.unsqueeze(-1)).min())

    low, high = 0.0, 0.5
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if margin(middle) > 0 else (low, middle)
    certify = Certify(stages=("bab",), timeout=20.0, arithmetic=arithmetic)
    (verdict,) = certtrain.certify(model, image, label, 0.95 * low, certify)
    assert verdict.status == "verified", (verdict.reason, low)
    if low < 0.45:
        (verdict,) = certtrain.certify(model, image, label, 1.1 * low, certify)
        assert verdict.status != "verified"


@pytest.mark.parametrize("arithmetic", ["real", "float32"])
def test_other_arithmetics_refuse_what_has_no_rounding_rule(arithmetic):
    model = Net(torch.sin, -1.0).eval().requires_grad_(False)
    image = torch.rand(1, 5)
    with pytest.raises(InputError, match="found sin; accepted in this arithmetic"):
        certtrain.certify(model, image, model(image).argmax(1), 0.01, Certify(stages=("crown",), arithmetic=arithmetic))


@pytest.mark.parametrize("stages", [("ibp",), ("crown",), ("alpha",), ("input_split",)])
def test_nothing_is_certified_where_a_logarithm_reaches_zero(stages):
    """What follows would hide it: sigmoid(log 0) = 0."""
    model = nn.Sequential(function(torch.log), nn.Sigmoid(), nn.Linear(5, 2)).eval().requires_grad_(False)
    model[2].weight.mul_(0.01), model[2].bias.copy_(torch.tensor([5.0, 0.0]))
    image = torch.full((1, 5), 0.5)
    certify = Certify(stages=stages, timeout=2.0)
    (proved,) = certtrain.certify(model, image, torch.tensor([0]), 0.4, certify)
    (open_,) = certtrain.certify(model, image, torch.tensor([0]), 0.5, certify)
    assert proved.status == "verified" and open_.status in ("unknown", "timeout")


@walk("name", ["sin", "elu", "hard swish", "abs", "relu6", "prelu", "erf"])
def test_what_is_exported_is_read(tmp_path, name):
    row = ROWS[name]
    model = Net(row.layers[0], row.above).eval().requires_grad_(False)
    x = torch.rand(4, 5)
    certtrain.export_onnx(model, tmp_path / "model.onnx", x)
    network = read_onnx(tmp_path / "model.onnx")
    torch.testing.assert_close(network.module(x), model(x), rtol=0, atol=1e-5)
    assert_bounded(network.module, model)


def test_rows_cover_every_curve():
    """Also functions that need no torch layer: each class of ours has a row; but for the root of sums of squares, which
    is that of numbers that are never below 0 (tests/test_norms.py)."""
    classes = {RootOfSquares, *(type(row.operation) for row in CURVES.values())}

    def below(kind: type) -> set[type]:
        return {kind} | {each for child in kind.__subclasses__() for each in below(child)}

    ours = {kind for kind in below(ScalarCurve) if kind.__module__.startswith("certtrain.")}
    assert {kind for kind in ours if not kind.__abstractmethods__} <= classes
