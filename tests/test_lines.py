"""Lines over intervals whose ends stand around every switch of every rule; what runs lies within its bounds."""

import math

import onnxruntime
import pytest
import torch
from activation_kinds import TROUGHS, by_name, relax
from onnx import TensorProto, helper, save
from torch import Tensor, nn

import certtrain
from certtrain.bounds import Bounds, Interval, compute_bounds
from certtrain.bounds.interval import Interval as Plain
from certtrain.bounds.operations.gates import GATES
from certtrain.bounds.relaxation import Lines
from certtrain.verifiers import Certify
from certtrain.verifiers.vnncomp import answer

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
KINKED = {"relu": 0.0, "leaky 0.01": 0.01, "leaky 0.5": 0.5}
SMOOTH = ("sigmoid", "tanh", *GATES)
NEURON = 1.1201487183570862, -0.3750925660133362


def exact(kind: str, x: Tensor) -> Tensor:
    """Float64, without cancellation."""
    match kind:
        case "sigmoid":
            return torch.special.expit(x)
        case "tanh":
            return torch.tanh(x)
        case "gelu":
            return x / 2 * torch.special.erfc(-x * math.sqrt(0.5))
        case "gelu_tanh":
            near = x.clamp(-1e3, 1e3)
            return x * torch.special.expit(2 * math.sqrt(2 / math.pi) * (near + 0.044715 * near**3))
    return x * torch.special.expit(x)


def derivative(kind: str, x: Tensor) -> Tensor:
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        return torch.autograd.grad(exact(kind, at).sum(), at)[0]


def touching(kind: str, end: Tensor, near: float, far: float) -> Tensor:
    """Where, between ``near`` and ``far``, the tangent meets the function at ``end``: by bisection in float64."""
    good, bad = torch.full_like(end, near), torch.full_like(end, far)

    def gap(place: Tensor) -> Tensor:
        return exact(kind, place) + derivative(kind, place) * (end - place) - exact(kind, end)

    sign = gap(bad).sign()
    for _ in range(64):
        middle = (good + bad) / 2
        same = gap(middle).sign() == sign
        good, bad = torch.where(same, good, middle), torch.where(same, middle, bad)
    return bad


def switches(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, 1) ends: within a few ulps of each place at which a rule decides otherwise."""
    draw = torch.Generator().manual_seed(0)
    some = 4 * torch.randn(120, generator=draw, dtype=torch.float64)
    small = 10 ** (12 * torch.rand(120, generator=draw, dtype=torch.float64) - 11)
    neuron = torch.tensor([NEURON[1], NEURON[1] * 2, -0.5, -3.0], dtype=torch.float64)
    ends = torch.cat([some, small, -small, neuron])
    bends = [0.0] if kind in ("sigmoid", "tanh") else [-GATES[kind].bend, 0.0, GATES[kind].bend, TROUGHS[kind].place]
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 8
    fixed = [*bends, 1e-30, -1e-30, tiny, -tiny, tiny / 8, -tiny / 8, 0.5, 9.1, -9.1, 16.0, -16.0, 20.0, 40.0, -40.0,
             -88.8, 104.0, -104.0, 1e4, -1e4, 1e18, -1e18, huge, -huge]  # fmt: skip
    pairs = [(a, b) for a in fixed for b in fixed]
    lower = [torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in (0, 1)]
    first, last = [lower[0], ends, ends], [lower[1], ends, -ends]
    for bend in bends:
        first, last = [*first, ends], [*last, torch.full_like(ends, bend)]
    for bend in bends:
        for far in (-60.0, 60.0):
            first, last = [*first, ends], [*last, touching(kind, ends, bend, far)]
    one, two = torch.cat(first).to(dtype), torch.cat(last).to(dtype)
    steps = torch.randint(-5, 6, two.shape, generator=draw)
    one, two = (torch.cat([t, t]) for t in (one, two))
    moved = two
    for count in range(5):  # by up to five floats
        further = torch.nextafter(moved, torch.where(steps.repeat(2) > 0, torch.inf, -torch.inf).to(dtype))
        moved = torch.where(steps.repeat(2).abs() > count, further, moved)
    moved[: len(two)] *= 1 + 20 * torch.finfo(dtype).eps * torch.randn(len(two), generator=draw, dtype=dtype)
    if kind in ("sigmoid", "tanh"):  # more of what touches at ``upper``, both ways round
        scale = 2 if kind == "sigmoid" else 1
        many = torch.cat([torch.full((40,), NEURON[1]).double(), -3 * torch.rand(8000, generator=draw).double()])
        place = touching("tanh", many, 0.0, 60.0)
        place[:40] = NEURON[0] + NEURON[1]
        place = place * (1 + torch.finfo(dtype).eps * torch.randint(-6, 7, place.shape, generator=draw))
        more, end = (scale * many).to(dtype), (scale * place).to(dtype)
        one, moved = torch.cat([one, more, -more]), torch.cat([moved, end, -end])
    return torch.minimum(one, moved).unsqueeze(1), torch.maximum(one, moved).unsqueeze(1)


def least_gaps(kind: str, lines: Lines, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) how far the function is above the lower, and below the upper line, at least: at even points, at points ever
    nearer to the ends and to 0, and where the function has the line's slope."""
    lower, upper = lower.double(), upper.double()
    share = torch.cat([torch.linspace(0, 1, 33), torch.logspace(-12, -1, 12)]).double()
    near = torch.cat([torch.linspace(-6, 6, 49), torch.logspace(-9, 1, 11), -torch.logspace(-9, 1, 11)]).double()
    points = torch.cat([lower * (1 - share) + upper * share, upper * (1 - share) + lower * share, near + 0 * lower], 1)
    assert lines.lower_intercept is not None
    found = []
    sides = ((1, lines.lower_slope, lines.lower_intercept), (-1, lines.upper_slope, lines.upper_intercept))
    for sign, slope, intercept in sides:
        slope, intercept = slope.double(), intercept.double()
        x = torch.minimum(torch.maximum(points, lower), upper)
        for step in (0.07, 0.003, 1e-4):  # closing in on the smallest gap
            gap = sign * (exact(kind, x) - slope * x - intercept)
            best = x.gather(1, gap.argmin(1, keepdim=True))
            finer = torch.minimum(torch.maximum(best + torch.linspace(-step, step, 21).double(), lower), upper)
            x = torch.cat([x, finer], 1)
        found.append((sign * (exact(kind, x) - slope * x - intercept)).amin(1))
    return found[0], found[1]


@pytest.mark.parametrize("kind", SMOOTH)
@DTYPES
def test_lines_around_every_switch(kind, dtype):
    """With no tolerance: what is paid for kernels is a hundred times what this oracle is off by, in float32; in float64
    a few times."""
    for lower, upper in zip(*(ends.split(20_000) for ends in switches(kind, dtype))):
        lines = relax(by_name(kind), lower, upper)
        below, above = least_gaps(kind, lines, lower, upper)
        assert (below >= 0).all() and (above >= 0).all()
        if kind in ("sigmoid", "tanh"):  # forward lines rely on it
            assert (lines.lower_slope >= 0).all() and (lines.upper_slope >= 0).all()


@pytest.mark.parametrize("name", KINKED)
@DTYPES
def test_kinked_lines_around_every_switch(name, dtype):
    """Scales from the least to the largest normal number, mixed."""
    low = KINKED[name]
    info = torch.finfo(dtype)
    powers = torch.linspace(math.log10(info.tiny), math.log10(info.max) - 1e-3, 60, dtype=torch.float64)
    sizes = torch.cat([10**powers, torch.tensor([info.tiny, 1.0, info.max], dtype=torch.float64)]).to(dtype)
    below, upper = (t.reshape(-1, 1) for t in torch.meshgrid(sizes, sizes, indexing="ij"))
    for lower in (-below, 0 * below):
        lines = relax(by_name("relu" if low == 0 else "leaky_relu", low), lower, upper)
        parts = [part.double() for part in (lines.lower_slope, lines.upper_slope, lines.upper_intercept)]
        for share in (0.0, 0.3, 1.0):
            x = (lower.double() * (1 - share) + upper.double() * share).clamp(max=torch.finfo(torch.float64).max)
            if dtype == torch.float64:  # so that the oracle does not overflow
                x = x / 4
            value = torch.where(x > 0, x, low * x)
            # relative to what rises to the right of 0, and to what falls to the left of it
            size = torch.maximum(upper.double() / (1 if dtype == torch.float32 else 4), low * -lower.double())
            intercept = parts[2] / (1 if dtype == torch.float32 else 4)
            assert (parts[1] * x + intercept >= value - 8 * info.eps * size).all()
            assert (parts[0] * x <= value + 8 * info.eps * size).all()


class Neuron(nn.Module):
    """(B, 1) → (B, 2): slope x + constant, and tanh(weight x + bias)."""

    def __init__(self, weight: float, bias: float, slope: float, constant: float):
        super().__init__()
        self.inner, self.line, self.spread = nn.Linear(1, 1), nn.Linear(1, 2), nn.Linear(1, 2)
        with torch.no_grad():
            for layer, weights, biases in (
                (self.inner, [[weight]], [bias]), (self.line, [[slope], [0.0]], [constant, 0.0]),
                (self.spread, [[0.0], [1.0]], [0.0, 0.0]),
            ):  # fmt: skip
                layer.weight.copy_(torch.tensor(weights)), layer.bias.copy_(torch.tensor(biases))

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x) + self.spread(torch.tanh(self.inner(x)))


def test_a_neuron_that_touches_at_its_end(tmp_path):
    """Its chord is 0.07 under tanh: nothing may be proved of what lies between."""
    weight, bias = NEURON
    ends = [math.tanh(bias), math.tanh(weight + bias)]
    model = Neuron(weight, bias, ends[1] - ends[0], ends[0] + 0.01).eval().requires_grad_(False)
    x = torch.linspace(0, 1, 1001).unsqueeze(1)
    logits = model(x)
    assert float((logits[:, 0] - logits[:, 1]).min()) < -0.04
    stages = ("ibp", "crown_ibp", "crown", "alpha", "input_split")
    for stage in stages:
        image = torch.tensor([[0.0]])
        (verdict,) = certtrain.certify(model, image, torch.tensor([0]), 1.0, Certify(stages=(stage,), timeout=10.0))
        assert verdict.status in ("unknown", "falsified"), stage
    certtrain.export_onnx(model, tmp_path / "model.onnx", x)
    (tmp_path / "spec.vnnlib").write_text(
        "(declare-const X_0 Real)\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n"
        "(assert (>= X_0 0.0))\n(assert (<= X_0 1.0))\n(assert (>= Y_1 Y_0))\n"
    )
    assert answer(tmp_path / "model.onnx", tmp_path / "spec.vnnlib", 20.0).word == "violated"


def onnx_file(path, op: str):
    """One operator on (1, 1)."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], op, ends[:1], ends[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


@pytest.mark.parametrize(("op", "low", "high", "unsafe"), [
    ("Sigmoid", -16.0, -15.8, "<= Y_0 0.0"), ("Sigmoid", 16.0, 30.0, ">= Y_0 1.0"), ("Tanh", 9.0, 9.2, ">= Y_0 1.0"),
    ("Tanh", 4.0, 30.0, ">= Y_0 1.0000001"), ("Tanh", -30.0, -4.0, "<= Y_0 -1.0000001"),
])  # fmt: skip
def test_the_range_of_a_function_is_not_its_kernels(tmp_path, op, low, high, unsafe):
    onnx_file(tmp_path / "one.onnx", op)
    (tmp_path / "one.vnnlib").write_text(
        "(declare-const X_0 Real)\n(declare-const Y_0 Real)\n"
        f"(assert (>= X_0 {low}))\n(assert (<= X_0 {high}))\n(assert ({unsafe}))\n"
    )
    assert answer(tmp_path / "one.onnx", tmp_path / "one.vnnlib", 3.0).word != "holds"


RUN = {"sigmoid": "Sigmoid", "tanh": "Tanh", "gelu": "Gelu", "silu": "Sigmoid"}


@pytest.mark.parametrize("kind", SMOOTH)
def test_what_runs_lies_within_bounds(kind):
    """Onnxruntime's and torch's values at 2000 points of each interval, in intervals and between lines."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    nodes = {
        "silu": [helper.make_node("Sigmoid", ["x"], ["g"]), helper.make_node("Mul", ["x", "g"], ["y"])],
        "gelu_tanh": [helper.make_node("Gelu", ["x"], ["y"], approximate="tanh")],
    }.get(kind) or [helper.make_node(RUN[kind], ["x"], ["y"])]
    graph = helper.make_graph(nodes, kind, ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    activation = by_name(kind)
    table = [(-16.0, -15.8), (15.8, 16.0), (8.9, 9.1), (-9.1, -8.9), (4.0, 30.0), (-30.0, -4.0), (-90.0, -80.0),
             (-1e4, 1e4), (0.9, 1.1), (-1.1, -0.9), (-0.8, -0.7), (-1e-30, 1e-30), (1.005, 1.009), (3.0, 3.0),
             (4.1, 4.2), (8.0, 8.3), (1e30, 2e30), (-2e30, -1e30), (-1e36, 1e36)]  # fmt: skip
    for low, high in table:
        lower, upper = torch.tensor([[low]]), torch.tensor([[high]])
        x = torch.cat([torch.linspace(0, 1, 2000), torch.tensor([0.0, 1.0])])
        x = (lower[0] * (1 - x) + upper[0] * x).clamp(low, high)
        box = activation.interval(Interval.from_bounds(lower, upper))
        lines = relax(activation, lower, upper)
        assert lines.lower_intercept is not None
        for value in (torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), activation(x)):
            value = value.double()
            assert (value >= (box.center.double() - box.radius.double())).all()
            assert (value <= (box.center.double() + box.radius.double())).all()
            assert (value >= lines.lower_slope.double() * x.double() + lines.lower_intercept.double()).all()
            assert (value <= lines.upper_slope.double() * x.double() + lines.upper_intercept.double()).all()


def test_intervals_of_huge_ends_are_finite():
    most = torch.finfo(torch.float32).max
    lower = torch.tensor([0.6 * most, -most / 2, -0.9 * most, 0.9 * most])
    upper = torch.tensor([0.7 * most, most / 2, -0.6 * most, 0.9 * most])
    found = Plain.from_bounds(lower, upper)
    assert found.center.isfinite().all() and found.radius.isfinite().all()
    assert (found.lower <= lower).all() and (found.upper >= upper).all() and found.radius[3] == 0
    relu = Interval(*certtrain.kernels.ibp_relu(found.center, found.radius))
    assert relu.center.isfinite().all() and (relu.lower <= lower.relu()).all() and (relu.upper >= upper.relu()).all()


def layers(*parts: tuple[list, list] | nn.Module) -> nn.Module:
    """Linear layers, by (weight, bias), and other modules."""
    made = []
    for part in parts:
        if isinstance(part, nn.Module):
            made.append(part)
            continue
        weight, bias = torch.tensor(part[0]), torch.tensor(part[1])
        layer = nn.Linear(*weight.T.shape)
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        made.append(layer)
    return nn.Sequential(*made).eval().requires_grad_(False)


B = 3e38
OVERFLOWING = {
    # relu(B (2 x - 1)) in (-B, B), whose ends are further apart than any number; in units of B, class 0 has 1/2 - that
    "relu": layers(([[2 * B / 3 * 1.5], [-2 * B / 3 * 1.5]], [-B / 2, B / 2]), nn.ReLU(),
                   ([[-1 / B, 0.0], [0.0, 0.0]], [0.25, 0.0])),
    "wide": layers(([[1.7e38] * 2], [-B / 2]), nn.ReLU(), ([[-1 / B], [0.0]], [0.25, 0.0])),
    # the sum overflows although its value does not, and what follows makes infinity finite again
    "saturated": layers(([[B, B, -B, -B]], [0.0]), nn.Tanh(), ([[1.0], [0.0]], [-0.5, 0.0])),
    "sigmoid": layers(([[B, B, -B, -B]], [-1.0]), nn.Sigmoid(), ([[1.0], [0.0]], [-0.6, 0.0])),
    "negative": layers(([[-B, -B, B, B]], [0.0]), nn.ReLU(), ([[-1.0], [0.0]], [0.5, 0.0])),
    "gelu": layers(([[-B, -B, B, B]], [1.0]), nn.GELU(), ([[-1.0], [0.0]], [0.5, 0.0])),
    # it runs to infinity on the whole set
    "infinite": layers(([[B, B]], [B]), nn.ReLU(), ([[1.0], [0.0]], [0.0, 0.0])),
    "minus infinite": layers(([[B, B]], [B]), ([[-1.0], [0.0]], [1.0, 0.0]), nn.ReLU(), ([[-1.0, 0.0], [0.0, 0.0]],
                                                                                        [0.5, 0.0])),
    "average": layers(nn.AvgPool2d(2), nn.Flatten(), ([[B]], [B]), nn.Tanh(),
                      ([[1.0], [0.0]], [0.0, 0.0])),
}  # fmt: skip


@pytest.mark.parametrize("arithmetic", ["nearest", "real", "float32"])
@pytest.mark.parametrize("name", OVERFLOWING)
def test_nothing_is_verified_of_what_overflows(name, arithmetic):
    """Where float32's numbers end no certificate begins: unless it is one of exact arithmetic, and true."""
    model = OVERFLOWING[name]
    shape = (1, 1, 2, 2) if name == "average" else (1, model[0].in_features)
    if arithmetic != "nearest" and any(isinstance(m, nn.Tanh | nn.Sigmoid | nn.GELU) for m in model):
        pytest.skip("smooth functions have no bounds in this arithmetic")
    for centre, epsilon in ((0.5, 0.5), (0.5, 0.0), (1.0, 0.25)):
        x = torch.full(shape, centre)
        points = torch.cat(
            [(x + epsilon * (2 * torch.rand(500, *shape[1:]) - 1)).clamp(0, 1), x, x + epsilon, x - epsilon]
        )
        exactly = model.double()(points.clamp(0, 1).double())
        model.float()
        for stage in ("ibp", "crown_ibp", "crown", "alpha", "input_split"):
            settings = Certify(stages=(stage,), arithmetic=arithmetic, timeout=2.0)
            (verdict,) = certtrain.certify(model, x, torch.tensor([0]), epsilon, settings)
            if verdict.status == "verified":
                assert arithmetic == "real" and (exactly[:, 0] > exactly[:, 1]).all(), (stage, centre, epsilon)
            if verdict.reason == "overflow":
                assert verdict.lower_bound is None


def test_large_numbers_that_fit_are_certified():
    """Up to 1e37, in each arithmetic."""
    model = layers(([[1e37], [-1e37]], [0.0, 1e36]), nn.ReLU(), ([[1e-37, 0.0], [0.0, 1e-37]], [0.5, 0.0]))
    for arithmetic in ("nearest", "real", "float32"):
        settings = Certify(stages=("ibp",), arithmetic=arithmetic)
        (verdict,) = certtrain.certify(model, torch.tensor([[0.5]]), torch.tensor([0]), 0.1, settings)
        assert verdict.status == "verified"


def test_image_of_bounds_holds_ends_of_relu():
    """The intervals of LeakyReLU and ReLU have nothing to pay for."""
    x = Bounds(torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 1.0]))
    for activation in (by_name("relu"), by_name("leaky_relu", 0.25)):
        found = activation.interval(x.interval())
        assert torch.equal(found.upper, torch.tensor([2.0, 1.0]))
    assert compute_bounds(nn.Sequential(nn.ReLU()), x.interval()).lower.tolist() == [0.0, 0.5]
