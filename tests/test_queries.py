"""Queries in VNN-LIB 2.0 about several networks and hidden tensors: answers, counterexamples, and what is refused."""

import contextlib
import itertools
import json
import math
import random
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import test_onnx_more
import test_onnx_network
import test_onnx_norms
import test_onnx_products
import torch
import vnnlib
from milp_oracle import minimum
from onnx import TensorProto, helper, numpy_helper
from test_vnncomp import NEEDLE, TENT, save_network
from test_vnncomp_second import fractions, value
from walking import walk

from certtrain.bounds import Box
from certtrain.bounds.crown import interval_bounds
from certtrain.bounds.folding import fold
from certtrain.errors import InputError
from certtrain.verifiers.instances import run_instances
from certtrain.verifiers.joint_network import joint_network
from certtrain.verifiers.onnx_graphs import difference_between
from certtrain.verifiers.onnx_network import HiddenTensorError, read_onnx
from certtrain.verifiers.queries import read_question
from certtrain.verifiers.vnncomp import ONLY_TIES, Answer, answer
from certtrain.verifiers.vnnlib_reader import read_query

LINE = [([[1.0]], [0.0])]
KINDS = {TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64}


def save_graph(path: Path, nodes, given: dict, found: dict, weights: dict, kind=TensorProto.FLOAT, opset=13) -> Path:
    """A model of inputs and outputs by their shapes."""
    ends = [
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in ends.items()] for ends in (given, found)
    ]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "test", *ends, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def save_double(path: Path, weight, bias, kind=TensorProto.DOUBLE) -> Path:
    """One dense layer and a ReLU in float64, with weights that float32 does not hold."""
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1), helper.make_node("Relu", ["h"], ["y"])]
    weights = {"w": np.asarray(weight, KINDS[kind]), "b": np.asarray(bias, KINDS[kind])}
    ends = {"x": [1, len(weight[0])]}, {"y": [1, len(weight)]}
    return save_graph(path, nodes, *ends, weights, kind)


def save_image_network(path: Path) -> Path:
    """(1, 1, 4, 4) → Conv 'c' (1, 2, 3, 3) → Relu 'r' → the sum of each channel (1, 2). 'side' (1, 2, 1, 1), the
    largest entry of each, leads nowhere, and neither does the number 'index' of a channel."""
    kernel = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2) / 4 - 1
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalMaxPool", ["c"], ["side"]), helper.make_node("ArgMax", ["c"], ["index"], axis=1),
        helper.make_node("Relu", ["k"], ["constant"]),
        helper.make_node("ReduceSum", ["r", "axes"], ["y"], keepdims=0),
    ]  # fmt: skip
    weights = {"k": kernel, "axes": np.array([2, 3])}
    return save_graph(path, nodes, {"x": ["batch", 1, 4, 4]}, {"y": ["batch", 2]}, weights)


def save_two_inputs(path: Path, scale: float = 1.0) -> Path:
    """a (1, 2, 2) and b (1, 3): y = scale · relu(the columns' sums of a, ·) b summed with b, z = the sum of b."""
    nodes = [
        helper.make_node("ReduceSum", ["a", "axes"], ["s"], keepdims=0), helper.make_node("MatMul", ["s", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]), helper.make_node("Relu", ["q"], ["y"]),
        helper.make_node("ReduceSum", ["b", "axes"], ["z"], keepdims=1),
    ]  # fmt: skip
    weights = {"axes": np.array([1]), "w": np.array([[1, 0, -1], [0, 2, 1]], np.float32) * np.float32(scale)}
    return save_graph(path, nodes, {"a": [1, 2, 2], "b": [1, 3]}, {"y": [1, 3], "z": [1, 1]}, weights)


def interval(name: str, low: float, high: float) -> str:
    return f"(assert (and (>= {name} {low:.6f}) (<= {name} {high:.6f})))\n"


def pair(assertions: str, second: str = "", hidden: str = "", size: int = 1, ends=(0.0, 1.0), more: str = "") -> str:
    """A query about f: X → Y and g: U → V with so many inputs each, in a box."""
    box = "".join(interval(f"{name}[0,{i}]", *ends) for name in "XU" for i in range(size))
    return (
        "(vnnlib-version <2.0>)\n"
        f"(declare-network f (declare-input X float32 [1,{size}]) {hidden} (declare-output Y float32 [1,1]))\n"
        f"(declare-network g {second} (declare-input U float32 [1,{size}]) {more} (declare-output V float32 [1,1]))\n"
        f"{box}{assertions}\n"
    )


@cache
def session(model: bytes, optimised: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def exact_runs(networks: dict[str, Path], declared, inputs: dict[str, np.ndarray], optimised: bool) -> dict:
    """All tensors of a query, as onnxruntime gives them, exactly."""
    found = {name: fractions(tensor) for name, tensor in inputs.items()}
    for network in declared:
        model = onnx.load(networks[network.equal_to or network.name])
        names = [hidden.onnx_name.strip('"') for hidden in network.hidden]
        outputs = [output.name for output in model.graph.output]
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
        stored = {weight.name for weight in model.graph.initializer}
        given = [one for one in model.graph.input if one.name not in stored]
        fed = {}
        for one, definition in zip(given, network.inputs, strict=True):
            shape = [size.dim_value or 1 for size in one.type.tensor_type.shape.dim]
            kind = KINDS[one.type.tensor_type.elem_type]
            fed[one.name] = inputs[definition.name].astype(kind).reshape(shape)
        for form, wanted, definitions in ((model, outputs, network.outputs), (shown, names, network.hidden)):
            run = session(form.SerializeToString(), optimised)
            for tensor, definition in zip(run.run(wanted, fed) if wanted else [], definitions, strict=True):
                found[definition.name] = fractions(tensor).reshape(tuple(definition.shape))
    return found


def assert_accepted(result: str, query: str, networks: dict[str, Path]) -> None:
    """The competition's rules for several networks: tensors in the order of declaration, a value a line; every
    assertion is true as written in either run of onnxruntime, and the default one gives the values that are listed."""
    parsed = vnnlib.parse_query_string(query)
    lines = result.splitlines()
    assert lines.pop(0) == "sat" and result.endswith("\n")
    listed = {}
    for network in parsed.networks:
        for definition in (*network.inputs, *network.hidden, *network.outputs):
            name, kind, *shape = lines.pop(0).split(" ")
            assert (name, shape) == (definition.name, [str(list(definition.shape)).replace(" ", "")])
            assert f" {kind} " in str(definition)
            count = math.prod(definition.shape)
            assert not any("e" in line.lower() for line in lines[:count])
            listed[name] = np.array([float(line) for line in lines[:count]]).reshape(tuple(definition.shape))
            del lines[:count]
    assert not lines
    given = {one.name for network in parsed.networks for one in network.inputs}
    inputs = {name: tensor.astype(np.float32) for name, tensor in listed.items() if name in given}
    for optimised in (False, True):
        exact = exact_runs(networks, parsed.networks, inputs, optimised)
        assert all(value(assertion.expr, exact) for assertion in parsed.assertions), (optimised, result)
    for name, tensor in listed.items():
        assert name in given or np.array_equal(fractions(tensor), exact[name]), name


@pytest.fixture
def ask(tmp_path):
    """The answer on a query about networks by their names; counterexamples must be accepted."""

    def ask(text: str, networks: dict[str, Path], **options) -> Answer:
        (tmp_path / "q.vnnlib").write_text(text)
        options = {"timeout": 20.0} | options
        found = answer(networks, tmp_path / "q.vnnlib", results=tmp_path / "result.txt", **options)
        result = (tmp_path / "result.txt").read_text()
        if found.word == "violated":
            assert_accepted(result, text, networks)
        else:
            assert result == {"holds": "unsat", "timeout": "timeout", "unknown": "unknown"}[found.word] + "\n"
        return found

    return ask


def hinges(draw: np.random.Generator, count: int = 6):
    """x → a sum of hinges on [0, 1], and where they bend."""
    weight, bias = draw.choice([-1.0, 1.0], (count, 1)), draw.integers(-8, 9, count) / 8
    layers = [(weight, bias), (draw.integers(-8, 9, (1, count)) / 4, draw.integers(-4, 5, 1) / 4)]
    return layers, [float(x) for x in -bias / weight[:, 0] if 0 <= x <= 1]


def computed(layers, x: np.ndarray) -> np.ndarray:
    for number, (weight, bias) in enumerate(layers):
        x = (np.maximum(x, 0) if number else x) @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64)
    return x


def test_the_program_has_all_inputs_then_outputs_then_hidden_tensors(tmp_path):
    """Of networks of two inputs and outputs, of float64, and twice the same, with and without hidden tensors."""
    first = read_onnx(save_two_inputs(tmp_path / "a.onnx"), ["p"], torch.float64)
    second = read_onnx(save_double(tmp_path / "b.onnx", [[0.1, 0.7], [-1 / 3, 2.0]], [0.1, 0.2]))
    image = read_onnx(save_image_network(tmp_path / "c.onnx"), ["side", "r", "side"], torch.float64)
    assert (first.own_outputs, second.own_outputs, image.own_outputs) == (4, 2, 2)
    joint = joint_network([first, second, image, second])
    assert (joint.shape, joint.outputs, joint.dtype) == (
        torch.Size([7 + 2 + 16 + 2]),
        4 + 2 + 2 + 2 + 3 + 22,
        torch.float64,
    )
    point = torch.randn(27, generator=torch.Generator().manual_seed(0))
    a, b, x, image_part, other = point.split((4, 3, 2, 16, 2))
    fed = [
        ("a.onnx", {"a": a.reshape(1, 2, 2).numpy(), "b": b[None].numpy()}, ["p"]),
        ("b.onnx", {"x": x[None].double().numpy()}, []),
        ("c.onnx", {"x": image_part.reshape(1, 1, 4, 4).numpy()}, ["side", "r", "side"]),
        ("b.onnx", {"x": other[None].double().numpy()}, []),
    ]
    outputs, hidden = [], []
    for name, given, extra in fed:
        model = onnx.load(tmp_path / name)
        own = [output.name for output in model.graph.output]
        model.graph.output.extend(onnx.ValueInfoProto(name=one) for one in dict.fromkeys(extra))
        run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs += [torch.from_numpy(tensor).double().flatten() for tensor in run.run(own, given)]
        hidden += [torch.from_numpy(run.run([one], given)[0]).double().flatten() for one in extra]
    expected = torch.cat([*outputs, *hidden])
    torch.testing.assert_close(joint.module(point[None].double())[0], expected, rtol=1e-6, atol=1e-6)
    runs = joint.replay()(point)
    assert runs.shape == (3, joint.outputs) and runs.dtype == torch.float64
    for run in runs:
        torch.testing.assert_close(run, expected, rtol=1e-5, atol=1e-5)


def test_pairs_that_share_an_input(ask, tmp_path):
    """The largest difference of two sums of hinges is at a bend: above it nothing is found, below it something."""
    for seed in range(6):
        draw = np.random.default_rng(seed)
        (first, bends), (second, others) = hinges(draw), hinges(draw)
        networks = {name: save_network(tmp_path / f"{name}{seed}.onnx", layers)
                    for name, layers in (("f", first), ("g", second))}  # fmt: skip
        places = np.array([[0.0], [1.0], *([x] for x in bends + others)])
        largest = float((computed(first, places) - computed(second, places)).max())
        for margin, word in ((0.002, "holds"), (-0.002, "violated")):
            text = pair(f"(assert (== X[0,0] U[0,0]))(assert (>= (- Y[0,0] V[0,0]) {largest + margin:.6f}))")
            found = ask(text, networks, arithmetic=random.Random(seed).choice(["nearest", "real", "float32"]))
            assert found.word == word, (seed, margin)


def test_networks_without_a_shared_input(ask, tmp_path):
    """Of a sum whose parts depend on different inputs, the largest value is the sum of the largest."""
    for seed in range(4):
        draw = np.random.default_rng(100 + seed)
        (first, bends), (second, others) = hinges(draw), hinges(draw)
        networks = {"f": save_network(tmp_path / "f.onnx", first), "g": save_network(tmp_path / "g.onnx", second)}
        largest = sum(
            float(computed(layers, np.array([[0.0], [1.0], *([x] for x in own)])).max())
            for layers, own in ((first, bends), (second, others))
        )
        for margin, word in ((0.002, "holds"), (-0.002, "violated")):
            assert ask(pair(f"(assert (>= (+ Y[0,0] V[0,0]) {largest + margin:.6f}))"), networks).word == word


def test_pairs_against_mixed_integer_programs(ask, tmp_path):
    for seed in range(3):
        draw = np.random.default_rng(200 + seed)
        networks = {}
        for name in "fg":
            layers = [(draw.normal(size=(8, 2)), draw.normal(size=8) / 4), (draw.normal(size=(6, 8)) / 2, [0.0] * 6),
                      (draw.normal(size=(1, 6)), [0.0])]  # fmt: skip
            networks[name] = save_network(tmp_path / f"{name}.onnx", layers)
        joint = joint_network([read_onnx(path, dtype=torch.float64) for path in networks.values()])
        network, box = fold(joint.module, joint.shape), Box(torch.zeros(1, 4).double(), torch.ones(1, 4).double())
        bounds = interval_bounds(network, box)
        rows, offsets = torch.tensor([[[-1.0, 0.5]]]).double(), torch.zeros(1, 1).double()
        largest = -float(minimum(network, box, rows, offsets, bounds).bounds[0])
        for margin, word in ((0.01, "holds"), (-0.01, "violated")):
            least = largest + margin
            text = pair(f"(assert (>= (- Y[0,0] (* 0.5 V[0,0])) {least:.6f}))", size=2)
            assert ask(text, networks).word == word, (seed, margin)


def test_a_counterexample_in_the_second_network_only(ask, tmp_path):
    """max(0, 1 - 3000 |x - 0.3|) in the second one, 0 in the first."""
    flat = [(np.zeros_like(weight), np.zeros_like(bias)) for weight, bias in NEEDLE]
    flat, needle = save_network(tmp_path / "flat.onnx", flat), save_network(tmp_path / "needle.onnx", NEEDLE)
    far = pair("(assert (== X[0,0] U[0,0]))(assert (>= (- V[0,0] Y[0,0]) 0.9))")
    assert ask(far, {"f": flat, "g": needle}).word == "violated"
    assert ask(far, {"f": needle, "g": flat}).word == "holds"
    either = pair("(assert (== X[0,0] U[0,0]))(assert (or (>= Y[0,0] 0.9) (<= V[0,0] -0.1) (>= V[0,0] 1.1)))")
    assert ask(either, {"f": flat, "g": needle}).word == "holds"
    assert ask(either, {"f": needle, "g": flat}).word == "violated"


def test_monotonicity_of_one_network_with_ties_on_the_diagonal(ask, tmp_path):
    """X <= U gives f(X) <= f(U), equal where X is U: a tie is a violation under >=, and none under >."""
    rising = [([[1.0], [2.0]], [0.0, -0.5]), ([[0.5, 1.0]], [0.0])]
    network = save_network(tmp_path / "n.onnx", rising)
    networks, before = {"f": network}, "(assert (<= X[0,0] U[0,0]))"
    found = ask(pair(f"{before}(assert (> Y[0,0] V[0,0]))", "(equal-to f)"), networks, timeout=4.0)
    assert found.word == "unknown" and found.reason == ONLY_TIES
    assert ask(pair(f"{before}(assert (>= Y[0,0] V[0,0]))", "(equal-to f)"), networks).word == "violated"
    assert ask(pair(f"{before}(assert (>= Y[0,0] (+ V[0,0] 0.01)))", "(equal-to f)"), networks).word == "holds"
    assert ask(pair(f"{before}(assert (> Y[0,0] (+ V[0,0] 0.01)))", "(equal-to f)"), {"f": save_network(
        tmp_path / "tent.onnx", TENT)}).word == "violated"  # fmt: skip
    same = pair("(assert (== X[0,0] U[0,0]))(assert (!= Y[0,0] V[0,0]))", "(equal-to f)")
    assert ask(same, networks, timeout=3.0).word in ("holds", "unknown")


def test_files_of_equal_networks(tmp_path):
    """The file of the network that it equals; the same file may be given for both, and a path alone."""
    network, other = save_network(tmp_path / "n.onnx", TENT), save_network(tmp_path / "o.onnx", TENT)
    (tmp_path / "q.vnnlib").write_text(pair("(assert (>= (+ Y[0,0] V[0,0]) 2.01))", "(equal-to f)"))
    for networks in (network, str(network), {"f": network}, {"f": network, "g": tmp_path / "." / "n.onnx"}):
        assert answer(networks, tmp_path / "q.vnnlib").word == "holds"
    with pytest.raises(
        InputError, match=r"q\.vnnlib, line 3: found 'g equal-to f with a file of its own'; accepted: a f"
    ):
        answer({"f": network, "g": other}, tmp_path / "q.vnnlib")
    joint, _ = read_question(network, tmp_path / "q.vnnlib")
    assert joint.parts[0] is joint.parts[1]


def test_two_inputs_of_different_shapes(ask, tmp_path):
    """In each of two networks, and a third of images."""
    networks = {"f": save_two_inputs(tmp_path / "f.onnx"), "g": save_two_inputs(tmp_path / "g.onnx", 1.5)}
    networks["h"] = save_image_network(tmp_path / "h.onnx")
    declared = "".join(
        f"(declare-network {name} {other} (declare-input A{name} float32 [1,2,2]) (declare-input B{name} float32 [3])"
        f"(declare-output Y{name} float32 [1,3]) (declare-output Z{name} float32 []))\n"
        for name, other in (("f", ""), ("g", "(isomorphic-to f)"))
    )
    declared += "(declare-network h (declare-input I float32 [1,1,4,4]) (declare-output J float32 [1,2]))\n"
    box = "".join(interval(f"{name}[{','.join(map(str, index))}]", 0.0, 1.0) for name, shape in
                  (("Af", (1, 2, 2)), ("Ag", (1, 2, 2)), ("Bf", (3,)), ("Bg", (3,)))
                  for index in np.ndindex(shape))  # fmt: skip
    box += "".join(interval(f"I[0,0,{i},{j}]", 0.0, float({i, j} <= {1, 2})) for i in range(4) for j in range(4))
    # y = relu(p + b) with p = (s0, 2 s1, s1 - s0), s the sums of columns, up to 2: at most 3, 5 and 3; 1.5 times p in g
    for assertion, word in {
        "(>= (+ Yf[0,1] Yg[0,1]) 12.01)": "holds",
        "(>= (+ Yf[0,1] Yg[0,1]) 11.99)": "violated",
        "(and (>= (+ Zf Zg) 5.99) (<= Yg[0,0] 1.01) (>= J[0,0] -1.0))": "violated",
        "(and (>= (+ Zf Zg) 5.99) (<= Yg[0,0] 0.9))": "holds",
        "(and (<= (+ J[0,0] J[0,1]) 6.01) (>= (+ J[0,0] J[0,1]) 5.99) (>= Zf 2.9))": "violated",
        "(>= (+ J[0,0] J[0,1]) 6.01)": "holds",
    }.items():
        text = f"(vnnlib-version <2.0>)\n{declared}{box}(assert {assertion})"
        assert ask(text, networks).word == word, assertion


def image_query(assertion: str, hidden: str, ends=(-1.0, 1.0)) -> str:
    box = "".join(interval(f"X[0,0,{i},{j}]", *(ends if {i, j} <= {1, 2} else (0.0, 0.0)))
                  for i in range(4) for j in range(4))  # fmt: skip
    return (
        f"(vnnlib-version <2.0>)\n(declare-network f (declare-input X float32 [1,1,4,4])\n{hidden}\n"
        f"(declare-output Y float32 [1,2]))\n{box}(assert {assertion})"
    )


def test_hidden_tensors(ask, tmp_path):
    """Of a convolution, its ReLU, and a side branch. Channel 0 has weights -1, -0.75, -0.5, -0.25 and channel 1 none,
    and 0.25, 0.5, 0.75: entries reach 2.5 and 1.5."""
    networks = {"f": save_image_network(tmp_path / "n.onnx")}
    hidden = '(declare-hidden C float32 [1,2,3,3] "c") (declare-hidden side float32 [2] "side")'
    hidden += '\n(declare-hidden again float32 [1,2,3,3] "c") (declare-hidden last float32 [1,2] "y")'
    hidden += '(declare-hidden given float32 [4,4] "x")'
    for assertion, word in {
        "(>= C[0,0,1,1] 2.501)": "holds",
        "(>= C[0,0,1,1] 2.499)": "violated",
        "(and (>= C[0,1,1,1] 1.499) (<= C[0,0,1,1] -0.4))": "violated",
        "(and (>= C[0,1,1,1] 1.4) (>= C[0,0,1,1] 2.4))": "holds",
        "(>= side[1] 1.501)": "holds",
        "(>= side[1] 1.4)": "violated",
        "(> C[0,0,1,1] side[0])": "unknown",
        "(>= C[0,0,1,1] (+ side[0] 0.1))": "holds",
        "(or (> C[0,1,2,2] again[0,1,2,2]) (>= (- last[0,0] Y[0,0]) 0.001))": "unknown",
        "(and (<= given[1,1] -0.5) (== given[1,1] X[0,0,1,1]) (>= C[0,1,1,1] 1.49))": "violated",
        "(and (<= given[1,2] -0.5) (>= C[0,1,1,1] 1.26))": "holds",
        "(and (>= C[0,0,1,1] 1.0) (<= Y[0,0] 0.99))": "holds",
        "(and (>= C[0,0,1,1] 1.0) (<= Y[0,0] 2.51))": "violated",
    }.items():
        found = ask(image_query(assertion, hidden), networks, timeout=3.0 if word == "unknown" else 30.0)
        assert found.word == word, assertion


@pytest.mark.filterwarnings("ignore")  # onnx's, of shapes that it does not infer
def test_every_tensor_of_every_graph(tmp_path):
    """Whatever rules make of the operators around it: as in onnxruntime, and within its bounds."""
    graphs = (*test_onnx_network.NETWORKS.values(), *test_onnx_more.NETWORKS.values())
    count = 0
    for build, shape in (*graphs, *test_onnx_norms.NETWORKS.values(), *test_onnx_products.NETWORKS.values()):
        graph = test_onnx_network.Graph(shape)
        model = graph.model(build(graph))
        (tmp_path / "n.onnx").write_bytes(model.SerializeToString())
        hidden = list[str]()
        for name in (name for node in model.graph.node for name in node.output):
            with contextlib.suppress(HiddenTensorError):  # a constant, or integers
                hidden += read_onnx(tmp_path / "n.onnx", [name]).hidden
        test_onnx_network.agrees(read_onnx(tmp_path / "n.onnx", hidden))
        count += len(hidden)
    assert count > 800


def test_hidden_tensors_of_several_networks(ask, tmp_path):
    """Of pairs of hinges: the layers before the ReLUs, in different order."""
    networks = {"f": save_network(tmp_path / "f.onnx", TENT), "g": save_network(tmp_path / "g.onnx", TENT)}
    hidden = '(declare-hidden H float32 [1,2] "y0")'
    more = '(declare-hidden R float32 [1,2] "a1") (declare-hidden L float32 [2] "y0")'
    for second, given in (("(isomorphic-to f)", networks), ("(equal-to f)", {"f": networks["f"]})):
        for assertion, word in {
            "(>= (+ H[0,0] L[1]) 1.001)": "holds",
            "(>= (+ H[0,0] L[1]) 0.999)": "violated",
            "(and (== X[0,0] U[0,0]) (>= (- H[0,0] L[0]) 0.001))": "holds",
            "(and (>= R[0,0] 0.5) (>= H[0,1] 0.2) (<= V[0,0] -0.9) (<= L[1] 0.0))": "violated",
            "(and (>= R[0,0] 0.5) (>= V[0,0] -0.9))": "holds",
        }.items():
            found = ask(pair(f"(assert {assertion})", second, hidden, more=more), given)
            assert found.word == word, assertion


def test_element_types_of_the_networks_differ(ask, tmp_path):
    """float32 and float64 side by side: all of it in float64, where float32 does not hold the weights."""
    networks = {"f": save_network(tmp_path / "f.onnx", LINE), "g": save_double(tmp_path / "g.onnx", [[1 / 3]], [0.0])}
    for declared, word in (("3.001", "holds"), ("2.999", "violated")):
        text = pair(f"(assert (== X[0,0] U[0,0]))(assert (>= (- (* {declared} V[0,0]) Y[0,0]) 0.0))")
        text = text.replace("float32", "real").replace("(>= X[0,0] 0.0", "(>= X[0,0] 0.1")
        text = text.replace("(>= (- (*", "(<= (- (*") if word == "violated" else text.replace("0.0))\n", "0.0011))\n")
        assert ask(text, networks).word == word
    with pytest.raises(
        InputError, match=r"line 3: found 'U float32 \[1,1\]'; accepted: the network's inputs, .*float64"
    ):
        ask(pair("(assert (>= V[0,0] 0.0))"), networks)


@pytest.mark.parametrize(("least", "words"), [("0.1000000005", ("holds", "unknown")), ("0.1", ("violated",))])
def test_models_of_float64_read_the_decimals(tmp_path, least, words):
    """Not what float32 makes of them: 0.10000000149."""
    network = save_double(tmp_path / "n.onnx", [[1.0]], [0.0])
    tensors = "(declare-input X real [1,1]) (declare-output Y real [1,1])"
    text = f"(assert (== X[0,0] 0.1)) (assert (>= Y[0,0] {least}))"
    (tmp_path / "q.vnnlib").write_text(f"(vnnlib-version <2.0>) (declare-network f {tensors}) {text}")
    found = answer(network, tmp_path / "q.vnnlib", timeout=20.0)
    assert found.word in words and found.inputs in (None, ["0.1"])
    assert found.outputs is None or found.outputs.tolist() == [0.1]


def test_networks_in_float64_read_the_same_numbers(ask, tmp_path):
    """Whoever runs them on the decimals as float64 gets the outputs that are listed."""
    networks = {"f": save_double(tmp_path / "f.onnx", [[1 / 3, 0.7]], [0.1]), "g": save_double(
        tmp_path / "g.onnx", [[0.2, -0.9]], [0.0])}  # fmt: skip
    text = pair("(assert (<= (+ Y[0,0] V[0,0]) 0.314159))(assert (>= (+ Y[0,0] V[0,0]) 0.314158))", size=2)
    found = ask(text.replace("float32", "real"), networks)
    assert found.word == "violated"
    listed = np.array([[float(text) for text in found.inputs]])
    runs = [session(networks[name].read_bytes(), True) for name in "fg"]
    outputs = [run.run(None, {"x": part}) for run, part in zip(runs, np.split(listed, 2, 1), strict=True)]
    assert np.array_equal(np.ravel(outputs), found.outputs)


NAMES = ["X[0,0]", "U[0,0]", "Y[0,0]", "V[0,0]", "H[0,1]"]


def random_formula(draw: random.Random, depth: int = 0) -> str:
    if depth > 1 or draw.random() < 0.3:
        sign, (left, right) = draw.choice(["<=", ">=", "<", ">", "<=", ">=", "==", "!="]), draw.sample(NAMES, 2)
        factor, shift = draw.randint(-4, 4) / 2, draw.randint(-6, 6) / 4
        return f"({sign} {left} (+ (* {factor:.1f} {right}) {shift:.2f}))"
    parts = " ".join(random_formula(draw, depth + 1) for _ in range(draw.randint(2, 3)))
    return f"({draw.choice(['and', 'and', 'or'])} {parts})"


def test_no_answer_is_contradicted_by_a_point(ask, tmp_path):
    """Random queries about pairs: where one holds, no point of a grid satisfies it in exact arithmetic."""
    axis, words = np.linspace(0, 1, 9, dtype=np.float32), set()
    for seed in range(16):
        draw, weights = random.Random(seed), np.random.default_rng(300 + seed)
        networks = {name: save_network(tmp_path / f"{name}.onnx", hinges(weights, 4)[0]) for name in "fg"}
        text = pair(f"(assert {random_formula(draw)})(assert (>= Y[0,0] -100.0))",
                    hidden='(declare-hidden H float32 [1,4] "y0")')  # fmt: skip
        found = ask(text, networks, timeout=2.0)
        words.add(found.word)
        if found.word == "holds":
            parsed = vnnlib.parse_query_string(text)
            for x, u in itertools.product(axis, axis):
                given = {"X": np.array([[x]]), "U": np.array([[u]])}
                exact = exact_runs(networks, parsed.networks, given, True)
                assert not all(value(assertion.expr, exact) for assertion in parsed.assertions), (seed, x, u)
    assert {"holds", "violated"} <= words


def test_declarations(tmp_path):
    (tmp_path / "q.vnnlib").write_text(
        "(vnnlib-version <2.0>) ; a comment (declare-network no\n(declare-network f (declare-input X real [1,2])\n"
        '(declare-input s real []) (declare-hidden H real [2] "a[1](;\\"b\\\\") (declare-output Y real [3]))\n'
        "(declare-network g (equal-to f) (declare-input U real [1,2]) (declare-input t real []) "
        '(declare-hidden G real [] "declare-output V") (declare-output V real [3]))\n'
        "(declare-network h2 (isomorphic-to f) (declare-input W real [1,2]) (declare-input r real [])\n"
        "(declare-output Z real [3]))\n(assert (<= G 1.0))"
    )
    declared = read_query(tmp_path / "q.vnnlib").declared
    names = [(one.name, one.line, one.equal_to, one.isomorphic_to) for one in declared.networks]
    assert names == [("f", 2, None, None), ("g", 4, "f", None), ("h2", 5, None, "f")]
    assert [tensor.name for tensor in declared.inputs] == ["X", "s", "U", "t", "W", "r"]
    assert [(tensor.name, tensor.source, tensor.line) for tensor in declared.hidden] == [
        ("H", 'a[1](;"b\\', 3), ("G", "declare-output V", 4),
    ]  # fmt: skip
    assert [(tensor.name, tensor.line) for tensor in declared.outputs] == [("Y", 3), ("V", 4), ("Z", 6)]
    lines = declared.assigned([str(i) for i in range(9)], [f"1{i}" for i in range(12)])
    assert [line for line in lines if " " in line] == [
        f"{tensor} real {shape}" for tensor, shape in
        (("X", "[1,2]"), ("s", "[]"), ("H", "[2]"), ("Y", "[3]"), ("U", "[1,2]"), ("t", "[]"), ("G", "[]"),
         ("V", "[3]"), ("W", "[1,2]"), ("r", "[]"), ("Z", "[3]"))
    ]  # fmt: skip
    values = "0 1 2 19 110 10 11 12 3 4 5 111 13 14 15 6 7 8 16 17 18"
    assert [line for line in lines if " " not in line] == values.split()


HOLDS = "(assert (<= Y[0,0] V[0,0]))"
PAIR = pair(HOLDS)
HIDDEN = "(declare-hidden H float32 {} {})"


def hidden_query(shape: str, name: str) -> str:
    return pair(HOLDS, hidden=HIDDEN.format(shape, name))


REFUSED = {
    # what the package passes
    "a network's name twice": (PAIR.replace("network g", "network f"), 3, "declare-network f", "a name for each"),
    "a tensor's name": (PAIR.replace("network g", "network Y"), 3, "declare-network Y", "a name for each"),
    "equal and isomorphic": (
        pair(HOLDS, "(equal-to f) (isomorphic-to f)"), 3, "g equal-to f isomorphic-to f", "one of the two",
    ),
    "two element types": (
        PAIR.replace("U float32", "U real").replace("V float32", "V real").replace("Y[0,0] V", "V[0,0] V"), 3,
        "float32 and real", "one element type in a query",
    ),
    "inputs alone": (pair("(assert (<= X[0,0] U[0,0])) ; Y[0,0]"), 4, "assertions about inputs alone", "tensor: Y, V"),
    # what it refuses
    "an unknown network": (pair(HOLDS, "(equal-to h)"), 3, "h", "not found"),
    "equal to itself": (pair(HOLDS, "(equal-to g)"), 3, "g", "type checker"),
    "shapes of equal ones": (
        pair(HOLDS, "(equal-to f)").replace("U float32 [1,1]", "U float32 [1,2]"), 3, "f", "same shape",
    ),
    "an undeclared tensor": (PAIR.replace("V[0,0]))", "W[0,0]))"), 6, "W", "type checker"),
    "a network's name as a tensor": (PAIR.replace("V[0,0]))", "g[0,0]))"), 6, "g", "type checker"),
    "initialized": (PAIR.replace("X float32 [1,1]", "X float32 [1,1] initialized"), 2, "initialized", "VNN-LIB 2.1"),
    "hidden without a name": (hidden_query("[1,2]", ""), 2, ")", "VNN-LIB 2.0"),
    "hidden behind outputs": (
        PAIR.replace("Y float32 [1,1])", f"Y float32 [1,1]) {HIDDEN.format('[1,2]', 'y0')}"), 2, "(declare-hidden",
        "VNN-LIB 2.0",
    ),
    # what is not the networks'
    "an input's shape": (
        PAIR.replace("U float32 [1,1]", "U float32 [1,2]"), 3, "U float32 [1,2]",
        "the network's inputs, in their order, as they are or real: float32 [1, 1]",
    ),
    "one input too many": (
        PAIR.replace("U float32 [1,1])", "U float32 [1,1]) (declare-input W float32 [1])"), 3,
        "U float32 [1,1]", "inputs, in their order",
    ),
    "an output's shape": (PAIR.replace("V float32 [1,1]", "V float32 [2,1]"), 3, "V float32 [2,1]", "float32 [1, 1]"),
    "a hidden one's shape": (hidden_query("[1,3]", '"y0"'), 2, "H float32 [1,3]", "hidden tensors, in their order"),
    "an input without an end": (PAIR.replace(" (<= U[0,0] 1.000000)", ""), 3, "U[0,0]", "an upper end"),
}  # fmt: skip


@walk("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    text, line, found, accepted = REFUSED[name]
    text = text.replace("[1,2] y0", '[1,2] "y0"')
    networks = {name: save_network(tmp_path / f"{name}.onnx", TENT) for name in "fg"}
    if "equal-to f" in text:
        del networks["g"]
    (tmp_path / "q.vnnlib").write_text(text)
    with pytest.raises(InputError) as error:
        answer(networks, tmp_path / "q.vnnlib", 5.0)
    said = str(error.value)
    assert f"q.vnnlib, line {line}: found {found!r}; accepted: " in said and accepted in said, said
    assert "\n" not in said and len(said) < 500


def test_hidden_tensors_that_a_graph_does_not_have(tmp_path):
    path = save_image_network(tmp_path / "n.onnx")
    for name, said in {
        "q": "found no tensor 'q'; accepted: names of inputs and of what operators compute, like ",
        "": "found no tensor ''; accepted: names of inputs",
        "k": "found no tensor 'k'; accepted: names of inputs",
        "index": r"found 'index', a tensor\(int64\); accepted: a hidden tensor\(float\), as the inputs are",
        "constant": "found 'constant', a constant; accepted: a hidden tensor computed from the input",
    }.items():
        (tmp_path / "q.vnnlib").write_text(image_query("(>= Y[0,0] 0.0)", f'(declare-hidden H float32 [1] "{name}")'))
        with pytest.raises(InputError, match=rf"q\.vnnlib, line 3: declare-hidden H: .*n\.onnx: {said}"):
            answer(path, tmp_path / "q.vnnlib")
        with pytest.raises(HiddenTensorError, match=said):
            read_onnx(path, [name])


FILES = {
    "none of g": (PAIR, ["f"], ", line 3: found 'declare-network g without a file'; accepted: a file for each of f, g"),
    "a path": (PAIR, "f", ", line 3: found 'declare-network g without a file'; accepted: a file for each of f, g"),
    "none": (PAIR, [], ", line 2: found 'declare-network f without a file'; accepted: a file for each of f, g"),
    "one of h": (
        PAIR,
        ["f", "g", "h"],
        "q.vnnlib: found a file for 'h', which is not declared; accepted: a file for each",
    ),
    "other names": (
        PAIR,
        ["g", "h"],
        "q.vnnlib: found a file for 'h', which is not declared; accepted: a file for each",
    ),
    "none of what others equal": (pair(HOLDS, "(equal-to f)"), ["g"], "found 'declare-network f without a file'"),
    "two in 1.0": ("(declare-const X_0 Real)", ["f", "g"], "q.vnnlib: found files of 2 networks (f, g); accepted: one"),
}


@walk("name", FILES)
def test_files_that_are_not_the_networks(tmp_path, name):
    text, names, said = FILES[name]
    networks = {name: save_network(tmp_path / f"{name}.onnx", LINE) for name in "fgh"}
    (tmp_path / "q.vnnlib").write_text(text)
    with pytest.raises(InputError) as error:
        answer(networks["f"] if names == "f" else {name: networks[name] for name in names}, tmp_path / "q.vnnlib")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_record_names_all_files(tmp_path):
    network = save_network(tmp_path / "n.onnx", LINE)
    (tmp_path / "q.vnnlib").write_text(PAIR)
    answer({"f": network, "g": network}, tmp_path / "q.vnnlib", record=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["onnx"] == {"f": str(network), "g": str(network)}


def test_a_mapping_names_the_only_network(tmp_path):
    network = save_network(tmp_path / "n.onnx", LINE)
    (tmp_path / "1.vnnlib").write_text("(declare-const X_0 Real)(declare-const Y_0 Real)"
                                       "(assert (and (>= X_0 0) (<= X_0 1) (>= Y_0 0.5)))")  # fmt: skip
    assert answer({"f": network}, tmp_path / "1.vnnlib").result().startswith("sat\n((X_0 ")


def graph_of(folder: Path, name: str, opset=13, slope=0.1, kind="LeakyRelu", width=3, axes=(1,), swapped=False) -> Path:
    """Two branches and their sum, with names and weights of their own."""
    draw = np.random.default_rng(len(list(folder.iterdir())))
    left = helper.make_node("MatMul", [f"{name}x", f"{name}w"], [f"{name}l"])
    right = helper.make_node("MatMul", [f"{name}x", f"{name}v"], [f"{name}r"])
    options = {"alpha": slope} if kind == "LeakyRelu" else {}
    nodes = [
        *((right, left) if swapped else (left, right)),
        helper.make_node(kind, [f"{name}r"], [f"{name}a"], **options),
        helper.make_node("Sub", [f"{name}l", f"{name}a"], [f"{name}s"]),
        helper.make_node("ReduceSum", [f"{name}s", f"{name}axes"], [f"{name}y"], keepdims=1),
    ]  # fmt: skip
    weights = {f"{name}{letter}": draw.normal(size=(2, width)).astype(np.float32) for letter in "wv"}
    weights[f"{name}axes"] = np.array(axes)
    return save_graph(folder / f"{name}.onnx", nodes, {f"{name}x": [1, 2]}, {f"{name}y": [1, 1]}, weights, opset=opset)


def test_isomorphic_networks(tmp_path):
    """Names, weights, slopes and the order of independent operators may differ; kinds, shapes and axes may not."""
    own = graph_of(tmp_path, "f")
    same = {"f": own, "g": graph_of(tmp_path, "g", slope=0.2, swapped=True, opset=14)}
    asked = pair(HOLDS, "(isomorphic-to f)", size=2)
    (tmp_path / "q.vnnlib").write_text(asked)
    read_question(same, tmp_path / "q.vnnlib")
    others = {
        "kind": ({"kind": "Relu"}, "operator 2 is LeakyRelu and Relu"),
        "width": ({"width": 4}, "operator 0, MatMul, has other attributes, inputs or shapes"),
        "axes": ({"axes": (-1,)}, "operator 4, ReduceSum, has other attributes, inputs or shapes"),
    }
    for name, (options, said) in others.items():
        with pytest.raises(InputError, match=rf"line 3: found 'g isomorphic-to f'; accepted: .* alone: {said}"):
            read_question({"f": own, "g": graph_of(tmp_path, name, **options)}, tmp_path / "q.vnnlib")
    deeper = save_network(tmp_path / "deeper.onnx", [(np.ones((3, 2)), np.zeros(3)), (np.ones((1, 3)), [0.0])])
    flat = save_network(tmp_path / "flat.onnx", [(np.ones((1, 2)), [0.0])])
    assert difference_between(read_onnx(deeper), read_onnx(flat)).startswith("operator 0, Gemm, has other")
    images = read_onnx(save_image_network(tmp_path / "image.onnx"))
    assert difference_between(read_onnx(flat), images) == "inputs are [(1, 2)] and [(1, 1, 4, 4)]"
    double = save_double(tmp_path / "double.onnx", np.ones((3, 2)) / 3, np.zeros(3))
    single = save_double(tmp_path / "single.onnx", np.ones((3, 2)), np.zeros(3), TensorProto.FLOAT)
    assert difference_between(read_onnx(double), read_onnx(single)) is None


def test_a_table_keeps_its_answers(tmp_path):
    """Hidden tensors and networks equal to others, in rows with one file."""
    save_network(tmp_path / "n.onnx", TENT)
    (tmp_path / "hidden.vnnlib").write_text(
        pair("(assert (>= H[0] 0.701))", "(equal-to f)", HIDDEN.format("[2]", '"y0"'))
    )
    (tmp_path / "pair.vnnlib").write_text(pair("(assert (>= (+ Y[0,0] V[0,0]) 1.9))", "(equal-to f)"))
    (tmp_path / "two.vnnlib").write_text(PAIR)
    (tmp_path / "t.csv").write_text(
        "".join(f"n.onnx,{name}.vnnlib,20\n" for name in ("hidden", "pair", "two", "hidden"))
    )
    run_instances(tmp_path / "t.csv", tmp_path / "r.csv")
    words = [line.split(",")[2] for line in (tmp_path / "r.csv").read_text().splitlines()]
    assert words == ["unsat", "sat", "error", "unsat"]


@pytest.mark.parametrize("option", ["results", "record"])
@pytest.mark.parametrize("file", ["f.onnx", "q.vnnlib"])
def test_files_that_are_read_are_not_written(tmp_path, option, file):
    """Results in place of a network or the query are refused before anything is written."""
    save_network(tmp_path / "f.onnx", LINE)
    tensors = "(declare-input X real [1,1]) (declare-output Y real [1,1])"
    text = "(assert (and (>= X[0,0] 0.0) (<= X[0,0] 1.0))) (assert (>= Y[0,0] 0.5))"
    (tmp_path / "q.vnnlib").write_text(f"(vnnlib-version <2.0>) (declare-network f {tensors}) {text}")
    before, place = (tmp_path / file).read_bytes(), tmp_path / "." / file
    with pytest.raises(InputError, match=f"{file}: found as a file of the query, which is read"):
        answer({"f": tmp_path / "f.onnx"}, tmp_path / "q.vnnlib", timeout=20.0, **{option: place})
    assert (tmp_path / file).read_bytes() == before
