"""Networks bounded by their difference from another: the operation by sampling, around switches and corners; the
program against the networks beside each other; bounds of random pairs; planted counterexamples; what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_differences import side_by_side
from networks import Residual, randomise_norms
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import Bounds, Box, trace
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.forward_linear import forward_bounds
from certtrain.bounds.network import Network, NetworkModule
from certtrain.bounds.operations import (
    ActivationDifference,
    Affine,
    Concat,
    Copies,
    Gelu,
    GeluTanh,
    Input,
    LeakyRelu,
    Operation,
    Rearrangement,
    Relu,
    Sigmoid,
    Silu,
    Tanh,
    Weights,
)
from certtrain.bounds.rounding import FLOAT32, REAL
from certtrain.verifiers import DifferenceStage, InputSplitStage, Limits, Problem, Specification, run_cascade, vnncomp
from certtrain.verifiers.differences import difference_network

KINDS = [Sigmoid, Tanh, Gelu, GeluTanh, Silu]
FUNCTIONS = {"relu": Relu("f", (0,)), "leaky": LeakyRelu("f", (0,), 0.25)} | {
    one.kind: one("f", (0,)) for one in KINDS
}  # fmt: skip
DTYPES = [torch.float32, torch.float64]


def difference_of(name: str) -> ActivationDifference:
    return ActivationDifference("d", (0, 1), FUNCTIONS[name])


def boxes(dtype: torch.dtype) -> tuple[Bounds, Bounds]:
    """Boxes of (z, d) whose ends lie around the switches at z = 0 and z + d = 0, or anywhere; points among them."""
    ends = torch.tensor([-3.0, -1.0, -0.25, -1e-3, -1e-30, 0.0, 1e-30, 1e-3, 0.25, 1.0, 3.0], dtype=dtype)
    pairs = torch.combinations(ends, 2, with_replacement=True)
    z, d = pairs.repeat_interleave(len(pairs), 0), pairs.repeat(len(pairs), 1)
    draw = torch.Generator().manual_seed(0)
    more = (torch.randn(4000, 2, 2, generator=draw, dtype=dtype) * torch.tensor([1.0, 0.2], dtype=dtype)[:, None]).sort(
        -1
    )
    z, d = torch.cat([z, more.values[:, 0]]), torch.cat([d, more.values[:, 1]])
    return Bounds(z[:, 0], z[:, 1]), Bounds(d[:, 0], d[:, 1])


def points(z: Bounds, d: Bounds) -> tuple[Tensor, Tensor]:
    """(B, P) points of the boxes: a grid with their corners, and points on both switches."""
    share = torch.linspace(0, 1, 9, dtype=z.lower.dtype)
    first, second = torch.cartesian_prod(share, share).unbind(1)
    at = [box.lower[:, None] * (1 - part) + box.upper[:, None] * part for box, part in ((z, first), (d, second))]
    kink = torch.zeros_like(at[0])
    at = torch.cat([at[0], kink, -at[1], at[0]], 1), torch.cat([at[1], at[1], at[1], -at[0]], 1)
    return tuple(
        torch.minimum(torch.maximum(part, box.lower[:, None]), box.upper[:, None]) for part, box in zip(at, (z, d))
    )


def tolerance(name: str, z: Bounds, d: Bounds) -> Tensor:
    """(B, 1) what rounds in coefficients and values; smooth functions' planes pay for it themselves."""
    size = torch.stack([z.lower.abs(), z.upper.abs()]).amax(0) + torch.stack([d.lower.abs(), d.upper.abs()]).amax(0)
    return (8 if FUNCTIONS[name].piecewise_linear else 0) * torch.finfo(size.dtype).eps * size.unsqueeze(1)


@walk("dtype", DTYPES)
@walk("name", FUNCTIONS)
def test_planes_enclose_the_difference(name, dtype):
    operation, (z, d) = difference_of(name), boxes(dtype)
    at, change = points(z, d)
    true, error = operation(at, change), tolerance(name, z, d)
    draw = torch.Generator().manual_seed(1)
    for alpha in (
        None,
        *(torch.full_like(z.lower, a) for a in (0.0, 0.5, 1.0)),
        torch.rand(len(z.lower), generator=draw),
    ):
        planes = operation.relax(z, d, alpha=None if alpha is None else alpha.to(dtype))
        for side, plane in ((-1, planes.lower), (1, planes.upper)):
            value = plane.first[:, None] * at + plane.second[:, None] * change + plane.constant[:, None]
            assert (side * (value - true) >= -error).all()
    default, half = operation.relax(z, d), operation.relax(z, d, alpha=torch.full_like(z.lower, 0.5))
    assert torch.equal(default.upper.constant, half.upper.constant)


@walk("dtype", DTYPES)
@walk("name", FUNCTIONS)
def test_intervals_enclose_the_difference(name, dtype):
    operation, (z, d) = difference_of(name), boxes(dtype)
    at, change = points(z, d)
    true, error = operation(at, change), tolerance(name, z, d)
    found = operation.interval(z.interval(), d.interval())
    assert (found.lower[:, None] <= true + error).all() and (found.upper[:, None] >= true - error).all()
    if FUNCTIONS[name].piecewise_linear:
        spare = 8 * torch.finfo(dtype).eps * (z.upper.abs() + z.lower.abs() + d.upper.abs() + d.lower.abs())
        assert (true.amin(1) - found.lower <= spare).all() and (found.upper - true.amax(1) <= spare).all()


@walk("name", ["relu", "leaky"])
def test_planes_of_kinked_functions_touch_them(name):
    """And are exact where both values lie on one side of the kink."""
    operation, (z, d) = difference_of(name), boxes(torch.float64)
    at, change = points(z, d)
    true, planes = operation(at, change), operation.relax(z, d)
    gaps = []
    for side, plane in ((-1, planes.lower), (1, planes.upper)):
        gap = side * (plane.first[:, None] * at + plane.second[:, None] * change + plane.constant[:, None] - true)
        assert (gap.amin(1) <= 1e-12).all()
        gaps.append(gap)
    sided = ((z.lower >= 0) & (z.lower + d.lower >= 0)) | ((z.upper <= 0) & (z.upper + d.upper <= 0))
    assert sided.any() and all((gap[sided] <= 1e-12).all() for gap in gaps)
    open_, _ = operation.open(z, d)
    assert torch.equal(open_, ~sided)


@walk("name", FUNCTIONS)
def test_gradients_reach_bounds_and_parameters(name):
    operation, draw = difference_of(name), torch.Generator().manual_seed(0)
    ends = torch.randn(4, 20, generator=draw, dtype=torch.float64).sort(0).values.requires_grad_()
    z, d = Bounds(ends[0], ends[3]), Bounds(ends[1] / 4, ends[2] / 4)
    alpha = torch.rand(20, generator=draw, dtype=torch.float64).requires_grad_()
    planes = operation.relax(z, d, alpha=alpha)
    total = (
        planes.upper.constant.sum()
        - planes.lower.constant.sum()
        + operation.interval(z.interval(), d.interval()).radius.sum()
    )
    gradients = torch.autograd.grad(total, (ends, alpha))
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)


def dense(*activations: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(4, 12)]
    for kind in activations:
        layers += [kind(), nn.Linear(12, 12)]
    return nn.Sequential(*layers, nn.Linear(12, 3))


MODELS = {
    "relu": ((4,), lambda: dense(nn.ReLU, nn.ReLU)),
    "leaky": ((4,), lambda: dense(nn.LeakyReLU)),
    "tanh": ((4,), lambda: dense(nn.Tanh, nn.Sigmoid)),
    "gelu": ((4,), lambda: dense(nn.GELU, nn.SiLU)),
    "residual": ((4,), lambda: nn.Sequential(
        nn.Linear(4, 8), Residual(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), -1), nn.Linear(8, 3))),
    "convolutions": ((2, 6, 6), lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))),
    "max pool": ((2, 6, 6), lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))),
}  # fmt: skip
"""(shape of an input, network)."""


def networks(name: str, count: int = 2, change: float = 1e-2) -> tuple[torch.Size, list[NetworkModule]]:
    """Programs of one graph; the weights of all behind the first are moved by a share of their size."""
    torch.manual_seed(0)
    shape, make = MODELS[name]
    first = randomise_norms(make()).double().eval()
    modules = [first]
    for _ in range(count - 1):
        other = make().double().eval()
        other.load_state_dict(first.state_dict())
        for value in (value for value in other.state_dict().values() if value.is_floating_point()):
            value.mul_(1 + (change * torch.randn_like(value)).clamp(-0.5, 0.5))
        modules.append(other)
    return torch.Size(shape), [NetworkModule(trace(one, torch.Size(shape)).operations) for one in modules]


def merged(name: str, count: int = 2, change: float = 1e-2) -> Network:
    shape, programs = networks(name, count, change)
    return fold(side_by_side(programs), shape)


@walk("count", [2, 3])
@walk("name", MODELS)
@torch.no_grad()
def test_the_program_equals_the_networks_beside_each_other(name, count):
    shape, programs = networks(name, count)
    plain = fold(side_by_side(programs), shape)
    program = difference_network(plain)
    images = torch.randn(50, *shape, dtype=torch.float64)
    together = torch.cat([one(images) for one in programs], 1)
    assert torch.allclose(plain(images), together, rtol=0, atol=1e-12)
    assert program is not None and torch.allclose(program(images), together, rtol=0, atol=1e-12)
    kinds = [type(one) for one in program.operations]
    assert kinds.count(ActivationDifference) > 0 or "pool" in name


@torch.no_grad()
def test_inputs_may_be_shared_through_copies():
    """Of inputs that are copied and cut apart again; hidden values may be outputs too."""
    shape, programs = networks("relu")
    operations: list[Operation] = [Input("input", ()), Copies("twice", (0,), lambda x: torch.cat([x, x], 1))]
    ends, hidden = [], []
    for first, program in zip((0, 4), programs, strict=True):
        place = [len(operations)]
        operations.append(Rearrangement("own", (1,), lambda x, first=first: x[:, first : first + 4]))
        for one in program.network.operations[1:]:
            operations.append(replace(one, inputs=tuple(place[read] for read in one.inputs)))
            place.append(len(operations) - 1)
        ends.append(place[-1])
        hidden.append(place[2])
    plain = fold(NetworkModule([*operations, Concat("all", (*ends, *hidden), 1)]), shape)
    program = difference_network(plain)
    images = torch.randn(50, *shape, dtype=torch.float64)
    assert program is not None and torch.allclose(program(images), plain(images), rtol=0, atol=1e-12)
    assert len([one for one in program.operations if isinstance(one, ActivationDifference)]) == 2
    apart = [replace(one, function=lambda x: x[:, 1:5]) if one.path == "own" else one for one in operations]
    apart[2] = operations[2]
    plain = fold(NetworkModule([*apart, Concat("all", tuple(ends), 1)]), shape)
    assert difference_network(plain) is None


def difference_rows(outputs: int, like: Tensor) -> Tensor:
    """(1, 2 K, 2 K) the second network's outputs minus the first's, and the reverse."""
    unit = torch.eye(outputs, dtype=like.dtype)
    rows = torch.cat([-unit, unit], 1)
    return torch.cat([rows, -rows])[None]


@walk("change", [1e-4, 1e-2, 0.3])
@walk("name", MODELS)
@torch.no_grad()
def test_bounds_hold(name, change):
    plain = merged(name, change=change)
    program = difference_network(plain)
    shape, draw = plain.shapes[0], torch.Generator().manual_seed(1)
    rows = difference_rows(3, torch.zeros((), dtype=torch.float64))
    for radius in (0.0, 1e-3, 0.05, 0.5):
        center = torch.randn(1, *shape, generator=draw, dtype=torch.float64)
        box = Box(center - radius, center + radius)
        share = torch.rand(2000, *shape, generator=draw, dtype=torch.float64)
        share[:1000] = share[:1000].round()
        images = box.lower + share * (box.upper - box.lower)
        values, outputs = program.values(images), plain(images)
        true = (outputs @ rows[0].T).amin(0)
        for bounds in (interval_bounds(program, box), crown_bounds(program, box), forward_bounds(program, box)):
            for place, ends in bounds.items():
                inner = torch.cat([values[read].flatten(1) for read in program.operations[place].inputs], 1)
                spare = 1e-12 * (1 + inner.abs().amax())
                assert (inner >= ends.lower.flatten(1) - spare).all() and (inner <= ends.upper.flatten(1) + spare).all()
            assert (bound_forms(program, box, rows, bounds)[0] <= true + 1e-11).all()


@torch.no_grad()
def test_similar_networks_have_tight_differences():
    """Ten times as tight as the networks beside each other, at 1e-4 of the weights."""
    for name in ("relu", "gelu", "convolutions"):
        plain = merged(name, change=1e-4)
        program = difference_network(plain)
        box = Box(torch.full((1, *plain.shapes[0]), -0.3).double(), torch.full((1, *plain.shapes[0]), 0.3).double())
        rows = difference_rows(3, box.lower)
        own, apart = (bound_forms(one, box, rows, crown_bounds(one, box)).amin() for one in (program, plain))
        assert own < 0 and apart < 10 * own


@torch.no_grad()
def test_equal_layers_have_no_difference():
    """Up to the first layer that was changed; networks that are equal throughout have equal outputs."""
    shape, (first, _) = networks("relu")
    *before, last = first.network.operations
    moved = replace(last, layer=Weights(last.weight * 1.01, last.bias))
    program = difference_network(fold(side_by_side([first, NetworkModule([*before, moved])]), shape))
    assert not any(isinstance(one, ActivationDifference) for one in program.operations)
    same = difference_network(fold(side_by_side([first, first]), shape))
    images = torch.randn(9, *shape, dtype=torch.float64)
    assert torch.equal(*same(images).split(3, 1))
    assert len(same.operations) == len(first.network.operations) + 1


def in_float32(operation: Operation) -> Operation:
    if not isinstance(operation, Affine):
        return operation
    return replace(operation, layer=Weights(operation.weight.float(), operation.bias.float()))


@torch.no_grad()
def test_a_rounded_arithmetic_takes_exact_differences():
    shape, programs = networks("relu")
    single = [NetworkModule([in_float32(one) for one in program.network.operations]) for program in programs]
    plain = replace(fold(side_by_side(single), shape, dtype=torch.float64), rounding=REAL)
    program = difference_network(plain)
    assert program is not None and program.rounding is REAL
    box = Box(torch.full((1, 4), -0.3).double(), torch.full((1, 4), 0.3).double())
    rows = difference_rows(3, box.lower)
    covered = bound_forms(program, box, rows, crown_bounds(program, box))
    nearest = replace(program, rounding=None)
    paid = bound_forms(nearest, box, rows, crown_bounds(nearest, box)) - covered
    assert (paid > 0).all() and (paid < 1e-9).all()
    second = next(one.weight for one in reversed(single[1].network.operations) if isinstance(one, Affine))
    second[0, 0] = 1e-30  # its difference from any number of usual size is no float64
    plain = replace(fold(side_by_side(single), shape, dtype=torch.float64), rounding=REAL)
    assert difference_network(plain) is None
    assert difference_network(replace(plain, rounding=None)) is not None


def test_what_has_no_difference():
    """Single networks, other graphs, other activations, operations without a rule, and float32's rounding."""
    shape, programs = networks("relu")
    plain = fold(side_by_side(programs), shape)
    assert difference_network(replace(plain, rounding=FLOAT32)) is None
    assert difference_network(fold(programs[0], shape)) is None
    linear = nn.Linear(4, 12), nn.Linear(12, 3)
    others = [
        nn.Sequential(linear[0], nn.ReLU(), linear[1]), nn.Sequential(linear[0], nn.LeakyReLU(0.1), linear[1]),
        nn.Sequential(linear[0], nn.LeakyReLU(0.2), linear[1]), nn.Sequential(linear[0], nn.ELU(), linear[1]),
        nn.Sequential(linear[0], nn.Softmax(-1), linear[1]),
    ]  # fmt: skip
    traced = [NetworkModule(trace(one.eval(), shape).operations) for one in others]
    pairs = [(0, 1), (1, 2), (3, 3), (4, 4)]
    copies = [NetworkModule(trace(copied(one), shape).operations) for one in others]
    for one, other in pairs:
        assert difference_network(fold(side_by_side([traced[one], copies[other]]), shape)) is None


def copied(model: nn.Sequential) -> nn.Sequential:
    """The network with other weights."""
    return nn.Sequential(
        *(nn.Linear(one.in_features, one.out_features) if isinstance(one, nn.Linear) else one for one in model)
    ).eval()


def equivalence(
    programs: list[NetworkModule], shape: torch.Size, lower: Tensor, upper: Tensor, tolerance: float
) -> Problem:
    """|Y' - Y| < tolerance for all outputs, over boxes (B, *shape)."""
    rows = difference_rows(3, lower).expand(len(lower), -1, -1)
    offsets = torch.full(rows.shape[:2], tolerance, dtype=lower.dtype)
    specification = Specification(rows, offsets, torch.arange(6))
    return Problem(side_by_side(programs), Box(lower, upper), specification, torch.arange(len(lower)))


@walk("name", ["relu", "tanh", "convolutions"])
def test_the_stage_is_right_about_pairs(name):
    """With tolerances below and above the largest difference that sampling finds."""
    shape, programs = networks(name, change=1e-3)
    lower = torch.randn(2, *shape, dtype=torch.float64) / 4
    upper = lower + 0.02
    images = lower[:, None] + torch.rand(2, 4000, *shape, dtype=torch.float64) * (upper - lower)[:, None]
    both = [one(images.flatten(0, 1)).reshape(2, 4000, 3).detach() for one in programs]
    largest = float((both[1] - both[0]).abs().amax())
    above = run_cascade(equivalence(programs, shape, lower, upper, 1.5 * largest), [DifferenceStage()], Limits(20.0))
    assert [verdict.status for verdict in above] == ["verified"] * 2
    below = run_cascade(equivalence(programs, shape, lower, upper, 0.9 * largest), [DifferenceStage()], Limits(20.0))
    assert "falsified" in {verdict.status for verdict in below} or name == "convolutions"
    for number, verdict in enumerate(below):
        if verdict.status == "falsified":
            point = verdict.counterexample[None]
            assert float((programs[1](point) - programs[0](point)).detach().abs().max()) >= 0.9 * largest
        assert verdict.status != "verified" or float((both[1] - both[0])[number].abs().amax()) < 0.9 * largest


def bump(height: float) -> nn.Sequential:
    """A network with a bump of 0.01 width and of this height in its first output, at a place that sampling misses."""
    first, second, last = nn.Linear(2, 5), nn.Linear(5, 3), nn.Linear(3, 3)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0], [-1.0, 0], [0, 1.0], [0, -1.0], [1.0, 1.0]]))
        first.bias.copy_(torch.tensor([-0.271, 0.271, -0.613, 0.613, 0.0]))
        second.weight.zero_()
        second.weight[0, :4], second.bias[:] = -1.0, torch.tensor([0.005, 0.0, 1.0])  # 0.005 - |x - p|_1
        second.weight[1, 4] = 1.0
        last.weight.copy_(torch.eye(3))
        last.weight[0, 0] = height / 0.005
        last.bias.zero_()
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).eval()


@walk("arithmetic", ["nearest", "real"])
def test_a_planted_counterexample_is_found(arithmetic):
    """In the second network alone; and its twin without one is proved."""
    shape = torch.Size((2,))
    first, planted, twin = (NetworkModule(trace(bump(height), shape).operations) for height in (0.0, 0.1, 0.04))
    lower, upper = torch.zeros(1, 2), torch.ones(1, 2)
    for other, status in ((planted, "falsified"), (twin, "verified")):
        problem = equivalence([first, other], shape, lower, upper, 0.05)
        for stages in ([DifferenceStage()], [DifferenceStage(), InputSplitStage()]):
            (found,) = run_cascade(problem, stages, Limits(20.0), arithmetic=arithmetic)
            assert found.status == status and found.stage == "difference"


def test_pairs_beyond_its_share_of_the_time_are_left_to_other_stages():
    shape = torch.Size((2,))
    programs = [NetworkModule(trace(bump(height), shape).operations) for height in (0.0, 0.04)]
    problem = equivalence(programs, shape, torch.zeros(1, 2), torch.ones(1, 2), 0.05)
    stages = [DifferenceStage(share=1e-12), InputSplitStage()]
    (found,) = run_cascade(problem, stages, Limits(20.0))
    assert found.status == "verified" and found.stage == "input_split"


def test_float32_leaves_pairs_to_other_stages():
    shape = torch.Size((2,))
    programs = [NetworkModule(trace(bump(height), shape).operations) for height in (0.0, 0.04)]
    problem = equivalence(programs, shape, torch.zeros(1, 2), torch.ones(1, 2), 0.05)
    (found,) = run_cascade(problem, [DifferenceStage(), InputSplitStage()], Limits(20.0), arithmetic="float32")
    assert found.status == "verified" and found.stage == "input_split"


def test_single_networks_are_left_to_other_stages():
    _, (first, _) = networks("relu")
    specification = Specification(torch.eye(3)[None].double(), torch.full((1, 3), 1e3).double(), torch.arange(3))
    problem = Problem(first, Box(torch.zeros(1, 4).double(), torch.ones(1, 4).double()), specification, torch.arange(1))
    (found,) = run_cascade(problem, [DifferenceStage()], Limits(20.0))
    assert found.status == "unknown" and "one graph" in found.reason


def test_properties_of_pairs_have_the_stage():
    shape, programs = networks("relu")
    wide = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    pair = equivalence(programs, shape, *wide, 0.1)
    names = [stage.name for stage in vnncomp._stages(pair, vnncomp.Judge(), vnncomp.PROPERTY)]
    assert names == ["ibp", "crown_ibp", "falsify", "crown", "difference", "input_split"]
    alone = Problem(programs[0], pair.region, replace(pair.specification), pair.index)
    names = [stage.name for stage in vnncomp._stages(alone, vnncomp.Judge(), vnncomp.PROPERTY)]
    assert names == ["ibp", "crown_ibp", "falsify", "crown", "input_split"]


def saved(path: Path, networks: list[nn.Sequential]) -> Path:
    """An ONNX file of networks of one input, with their outputs concatenated."""
    nodes, weights, ends = [], [], []
    for number, network in enumerate(networks):
        name = "x"
        for place, layer in enumerate(network):
            output = f"{number}.{place}"
            if isinstance(layer, nn.Linear):
                parts = [f"{output}.weight", f"{output}.bias"]
                weights += [
                    numpy_helper.from_array(value.detach().numpy(), part)
                    for value, part in zip((layer.weight, layer.bias), parts, strict=True)
                ]
                nodes.append(helper.make_node("Gemm", [name, *parts], [output], transB=1))
            else:
                nodes.append(helper.make_node("Relu", [name], [output]))
            name = output
        ends.append(name)
    nodes.append(helper.make_node("Concat", ends, ["y"], axis=1))
    outputs = 3 * len(networks)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, k]) for n, k in (("x", 2), ("y", outputs)))
    graph = helper.make_graph(nodes, "pair", [x], [y], weights)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
    )
    return path


@walk("arithmetic", ["nearest", "real"])
def test_files_of_pairs_are_decided_by_their_difference(arithmetic, tmp_path: Path):
    names = "".join(f"(declare-const {name} Real)" for name in ("X_0", "X_1", *(f"Y_{k}" for k in range(6))))
    apart = " ".join(f"(>= (- Y_{k + 3} Y_{k}) 0.05) (<= (- Y_{k + 3} Y_{k}) -0.05)" for k in range(3))
    asked = tmp_path / "apart.vnnlib"
    asked.write_text(f"{names}(assert (and (>= X_0 0) (<= X_0 1) (>= X_1 0) (<= X_1 1)))(assert (or {apart}))")
    for height, word in ((0.1, "violated"), (0.04, "holds")):
        network = saved(tmp_path / "pair.onnx", [bump(0.0), bump(height)])
        settings = replace(vnncomp.PROPERTY, stages=("difference",))  # CROWN-IBP proves it too
        found = vnncomp.answer(network, asked, 20.0, arithmetic=arithmetic, certify=settings)
        assert found.word == word and found.stage == "difference"


@pytest.mark.parametrize("field", [{"alpha_steps": -1}, {"batch": 0}, {"share": 0.0}])
def test_fields_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match="found"):
        DifferenceStage(**field)
