"""Elementwise constants of a network file: each stays what it is, whichever arithmetic; onnxruntime is the judge."""

import itertools
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from certtrain.bounds import Box, Interval, compute_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.rounding import FLOAT32, interval_of
from certtrain.errors import InputError
from certtrain.verifiers import onnx_operators
from certtrain.verifiers.onnx_network import read_onnx, replay_session
from certtrain.verifiers.vnncomp import answer

ARITHMETICS = ("nearest", "real", "float32")


def save(path, nodes, weights, shape=(1, 1)):
    ends = [helper.make_tensor_value_info(name, 1, size) for name, size in (("x", shape), ("y", [1, 1]))]
    values = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "test", ends[:1], ends[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def chain(*steps):
    """(operator, constant, whether it comes first) one after the other."""
    nodes, weights, name = [], {}, "x"
    for number, (kind, constant, *first) in enumerate(steps):
        weights[f"c{number}"] = [constant]
        inputs = [f"c{number}", name] if first else [name, f"c{number}"]
        name = "y" if number == len(steps) - 1 else f"h{number}"
        nodes.append(helper.make_node(kind, inputs, [name]))
    return nodes, weights


def gemm(alpha, beta, weight, bias):
    return [helper.make_node("Gemm", ["x", "w", "b"], ["y"], alpha=alpha, beta=beta)], {"w": [[weight]], "b": [bias]}


def norm(weight, bias, mean, variance, before=()):
    nodes, weights = chain(*before) if before else ([], {})
    if nodes:
        nodes[-1].output[0] = "h"
    names = ["weight", "bias", "mean", "variance"]
    nodes.append(helper.make_node("BatchNormalization", ["h" if nodes else "x", *names], ["y"], epsilon=1e-5))
    return nodes, weights | dict(zip(names, ([weight], [bias], [mean], [variance]), strict=True))


def linear_norm(weight, bias, mean, variance):
    nodes, weights = norm(weight, bias, mean, variance)
    nodes[0].input[0] = "h"
    return [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), *nodes], weights | {"w": [[3.7]], "b": [0.1]}


NETWORKS = {
    "x + k - k": chain(("Add", 8192.0), ("Sub", 8192.0)),
    "x - k + k": chain(("Sub", 1000.7), ("Add", 1000.7)),
    "k - (k - x)": chain(("Sub", 12345.6, True), ("Sub", 12345.6, True)),
    "three in a row": chain(("Add", 5000.3), ("Add", -7000.1), ("Add", 1999.8)),
    "x * k / k": chain(("Mul", 0.1), ("Div", 0.1)),
    "x / 3": chain(("Div", 3.0)),
    "x / 3 * 3": chain(("Div", 3.0), ("Mul", 3.0)),
    "(x - mean) / std": chain(("Sub", 0.4914), ("Div", 0.2023)),
    "(x + k) * 0.7 - 0.7 k": chain(("Add", 3000.1), ("Mul", 0.7), ("Sub", 2100.07)),
    "Gemm's alpha": gemm(0.1, 1.0, 0.3, 0.25),
    "Gemm's beta": gemm(1.0, 0.1, 0.3, 0.7),
    "alpha, beta": gemm(1e4 / 3, -1e4 / 3, 0.1, 0.0333),
    "batch norm": norm(1.3, 0.2, 0.7, 0.3),
    "batch norm that cancels": norm(1.0, 4096.3, 4096.3, 1.0),
    "constants, then batch norm": norm(0.7, 900.1, 1300.3, 0.9, before=(("Add", 1300.3),)),
    "linear, then batch norm": linear_norm(0.7, 900.1, 1300.3, 0.9),
}  # fmt: skip


def sessions(path):
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = [onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
             for options in (plain, onnxruntime.SessionOptions())]  # fmt: skip
    return lambda x: [float(run.run(None, {"x": np.array([[x]], np.float32)})[0].item()) for run in found]


def ask(folder, path, low, high, unsafe, arithmetic):
    names = "(declare-const X_0 Real)(declare-const Y_0 Real)"
    (folder / "p.vnnlib").write_text(f"{names}(assert (and (>= X_0 {low!r}) (<= X_0 {high!r}) {unsafe}))")
    return answer(path, folder / "p.vnnlib", 5.0, arithmetic=arithmetic)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_point_is_what_onnxruntime_makes_of_it(tmp_path, name):
    """Unsafe: what it computes, exactly, and one float32 beside that. Under no arithmetic does the first hold."""
    path = save(tmp_path / "network.onnx", *NETWORKS[name])
    run = sessions(path)
    for x in (0.2718, -0.3333):
        x = float(np.float32(x))
        outputs = run(x)
        for arithmetic, comparison in itertools.product(ARITHMETICS, ("<=", ">=")):
            worst = max(outputs) if comparison == "<=" else min(outputs)
            assert ask(tmp_path, path, x, x, f"({comparison} Y_0 {Decimal(worst)})", arithmetic).word == "violated"
            best = min(outputs) if comparison == "<=" else max(outputs)
            found = ask(tmp_path, path, x, x, f"({comparison} Y_0 {Decimal(best)})", arithmetic)
            assert found.word == ("violated" if outputs[0] == outputs[1] else "unknown"), found


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_bounds_enclose_what_onnxruntime_computes(tmp_path, name):
    """A bound is asked for by itself, so that no replay decides: of points, and of boxes at all the points seen."""
    path = save(tmp_path / "network.onnx", *NETWORKS[name])
    run, network = sessions(path), read_onnx(path)
    points = np.linspace(-1, 1, 41).astype(np.float32)
    seen = [run(float(x))[0] for x in points]
    assert bounded(network, -1.0, 1.0, min(seen), max(seen))
    assert all(bounded(network, float(x), float(x), y, y) for x, y in zip(points, seen, strict=True))


def bounded(network, low, high, least, most) -> bool:
    rounded = replace(fold(network.module, network.shape, dtype=torch.float64, as_written=True), rounding=FLOAT32)
    values = [Box(*(torch.tensor([[end]], dtype=torch.float64) for end in (low, high))).hull]
    for operation in rounded.operations[1:]:
        values.append(interval_of(rounded, operation, *(values[read] for read in operation.inputs)))
    return bool(values[-1].lower <= least) and bool(values[-1].upper >= most)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_box_that_onnxruntime_violates_does_not_hold(tmp_path, arithmetic):
    """(x + 8192) - 8192 is a multiple of 2^-10: at 0.2004 it is less than x."""
    path = save(tmp_path / "network.onnx", *NETWORKS["x + k - k"])
    low = float(np.float32(0.2004))
    assert sessions(path)(low)[0] < 0.2003
    assert ask(tmp_path, path, low, 0.21, "(<= Y_0 0.2003)", arithmetic).word == "violated"


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float64_the_file_is_what_is_proved(tmp_path, name):
    """Its constants, evaluated in fractions, but for batch norms' square roots."""
    path = save(tmp_path / "network.onnx", *NETWORKS[name])
    model, network = onnx.load(path), read_onnx(path)
    folded = fold(network.module, network.shape, dtype=torch.float64, as_written=True)
    weights = {w.name: Fraction(float(numpy_helper.to_array(w).item())) for w in model.graph.initializer}
    for x in (0.1, 0.7, -0.3):
        values = weights | {"x": Fraction(x)}
        for node in model.graph.node:
            given = [values[read] for read in node.input]
            attributes = {a.name: Fraction(float(helper.get_attribute_value(a))) for a in node.attribute}
            match node.op_type:
                case "Add":
                    found = given[0] + given[1]
                case "Sub":
                    found = given[0] - given[1]
                case "Mul":
                    found = given[0] * given[1]
                case "Div":
                    found = given[0] / given[1]
                case "Gemm":
                    one = Fraction(1)
                    found = attributes.get("alpha", one) * given[0] * given[1] + attributes.get("beta", one) * given[2]
                case _:
                    value, weight, bias, mean, variance = given
                    root = Fraction(float(np.sqrt(float(variance + attributes["epsilon"]))))
                    found = (value - mean) / root * weight + bias
            values[node.output[0]] = found
        exact = folded(torch.tensor([[x]], dtype=torch.float64)).item()
        assert abs(exact - float(values["y"])) <= 1e-11, name  # roundings of float64 at 12,345, not of float32


def test_traced_constants_are_the_models(tmp_path):
    """Bounds of a module, and what is certified of it, at a point: the logits themselves."""

    class Shifted(nn.Module):
        def forward(self, x):
            return (x + 8192) - 8192

    model, x = nn.Sequential(Shifted(), nn.Flatten()), torch.rand(50, 1)
    logits = model(x)
    assert (logits != x).any()
    bounds = compute_bounds(model, Interval.from_bounds(x, x))
    assert torch.equal(bounds.lower, logits) and torch.equal(bounds.upper, logits)
    assert torch.equal(fold(model, x.shape[1:])(x), logits)


def test_the_reading_is_compared_where_a_centred_input_is_not_zero(tmp_path, monkeypatch):
    """A wrong weight: at the middle of the box, 0, nothing shows of it."""
    path = save(tmp_path / "network.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": [[2.0]]})
    right = onnx_operators.RULES["MatMul"]
    monkeypatch.setitem(onnx_operators.RULES, "MatMul", lambda step: step.scaled(right(step), 1.01, 0.0))
    with pytest.raises(InputError, match="differ from onnxruntime's"):
        ask(tmp_path, path, -1.0, 1.0, "(<= Y_0 -3.0)", "nearest")


def convolutional(path, seed):
    draw = np.random.default_rng(seed)
    channels, hidden, size = (int(draw.integers(*ends)) for ends in ((3, 9), (4, 17), (5, 9)))
    weights = {"w": draw.normal(size=(hidden, channels, 3, 3)), "b": draw.normal(size=hidden),
               "v": draw.normal(size=(1, hidden * size**2)), "c": draw.normal(size=1)}  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]), helper.make_node("Gemm", ["f", "v", "c"], ["y"], transB=1),
    ]  # fmt: skip
    x = draw.normal(size=(1, channels, size, size)).astype(np.float32)
    return save(path, nodes, weights, x.shape), x


def test_a_counterexample_stands_in_both_of_onnxruntimes_runs(tmp_path):
    """Points at which the unoptimised run and the default one differ; unsafe is what one of them alone computes."""
    differ = 0
    for seed in range(12):
        path, x = convolutional(tmp_path / "network.onnx", seed)
        plain, scored = replay_session(onnx.load(path))(torch.from_numpy(x[0]))[:, 0].tolist()
        (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
        assert scored == float(found.item())
        names = "".join(f"(declare-const X_{i} Real)" for i in range(x.size)) + "(declare-const Y_0 Real)"
        ends = " ".join(f"(= X_{i} {float(value)!r})" for i, value in enumerate(x.flatten()))
        differ += plain != scored
        for unsafe in (min(plain, scored), max(plain, scored)):
            (tmp_path / "p.vnnlib").write_text(f"{names}(assert (and {ends} (<= Y_0 {Decimal(unsafe)})))")
            said = str(answer(path, tmp_path / "p.vnnlib", 20))
            assert said == ("violated" if unsafe == max(plain, scored) else "unknown (within tolerance)")
    assert differ >= 10


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_norms_that_stay_apart_go_through_every_stage(tmp_path, arithmetic):
    """Convolution, batch norm and ReLU, 27 inputs that vary: what holds with room, and what a corner violates."""
    draw = np.random.default_rng(3)
    weights = {"w": draw.normal(size=(4, 3, 2, 2)), "g": draw.normal(size=4), "s": draw.normal(size=4) + 200.3,
               "m": draw.normal(size=4) + 200.3, "q": draw.random(4) + 0.5, "v": draw.normal(size=(1, 16)),
               "k": [200.3]}  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "k"], ["a"]),
        helper.make_node("BatchNormalization", ["a", "g", "s", "m", "q"], ["n"]),
        helper.make_node("Sub", ["n", "k"], ["b"]), helper.make_node("Relu", ["b"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]), helper.make_node("Gemm", ["f", "v"], ["y"], transB=1),
    ]  # fmt: skip
    path = save(tmp_path / "network.onnx", nodes, weights, (1, 3, 3, 3))
    run = replay_session(onnx.load(path))
    noise = torch.Generator().manual_seed(0)
    lowest = min(float(run(0.2 * (torch.rand(3, 3, 3, generator=noise).round() * 2 - 1))[0]) for _ in range(300))
    names = "".join(f"(declare-const X_{i} Real)" for i in range(27)) + "(declare-const Y_0 Real)"
    ends = " ".join(f"(>= X_{i} -0.2) (<= X_{i} 0.2)" for i in range(27))
    for unsafe, word in ((lowest + 0.01, "violated"), (lowest - 3.0, "holds")):
        (tmp_path / "p.vnnlib").write_text(f"{names}(assert (and {ends} (<= Y_0 {Decimal(unsafe)})))")
        assert answer(path, tmp_path / "p.vnnlib", 20.0, arithmetic=arithmetic).word == word
