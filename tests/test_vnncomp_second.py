"""VNN-COMP's front door with VNN-LIB 2.0: answers, their files, and queries that only this version can state."""

import gzip
import json
import math
import operator
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import vnnlib
from onnx import TensorProto, helper, numpy_helper
from test_vnncomp import IDENTITY, TENT, save_network, save_property

from certtrain.command_line import main
from certtrain.errors import InputError
from certtrain.verifiers.instances import run_instances
from certtrain.verifiers.onnx_network import read_onnx, replay_session
from certtrain.verifiers.vnncomp import ONLY_TIES, Answer, answer

SIGNS = {
    vnnlib.LessEqual: operator.le, vnnlib.GreaterEqual: operator.ge, vnnlib.LessThan: operator.lt,
    vnnlib.GreaterThan: operator.gt, vnnlib.Equal: operator.eq, vnnlib.NotEqual: operator.ne,
}  # fmt: skip


def value(node, tensors):
    """The value of a term or formula of the package, in exact arithmetic."""
    if type(node) in SIGNS:
        return SIGNS[type(node)](value(node.lhs, tensors), value(node.rhs, tensors))
    match node:
        case vnnlib.Var():
            return tensors[node.name][tuple(node.indices)]
        case vnnlib.Literal():
            return Fraction(node.lexeme)
        case vnnlib.Negate():
            return -value(node.expr, tensors)
        case vnnlib.Minus():
            return value(node.head, tensors) - sum(value(part, tensors) for part in node.rest)
        case vnnlib.Plus():
            return sum(value(part, tensors) for part in node.args)
        case vnnlib.Multiply():
            return math.prod(value(part, tensors) for part in node.args)
        case vnnlib.And():
            return all(value(part, tensors) for part in node.args)
        case vnnlib.Or():
            return any(value(part, tensors) for part in node.args)


def fractions(tensor: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda entry: Fraction(float(entry)), otypes=[object])(tensor)


def assert_accepted(result: str, query: str, network: Path) -> None:
    """The rules of the competition of 2026: tensors in the order of declaration, a value a line; onnxruntime's default
    run on the inputs as float32 satisfies all assertions; no tolerance is used."""
    parsed = vnnlib.parse_query_string(query)
    lines = result.splitlines()
    assert lines.pop(0) == "sat" and result.endswith("\n")
    inputs, outputs = {}, {}
    (declared,) = parsed.networks
    for tensors, definitions in ((inputs, declared.inputs), (outputs, declared.outputs)):
        for definition in definitions:
            name, kind, *shape = lines.pop(0).split(" ")
            assert (name, shape) == (definition.name, [str(list(definition.shape)).replace(" ", "")])
            assert f" {kind} " in str(definition)
            count = math.prod(definition.shape)
            assert not any("e" in line.lower() for line in lines[:count])  # the standard's numbers have no exponent
            tensors[name] = np.array([float(line) for line in lines[:count]], np.float32).reshape(definition.shape)
            del lines[:count]
    assert not lines
    run = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    given = zip(run.get_inputs(), inputs.values(), strict=True)
    shapes = {place.name: [size if isinstance(size, int) else 1 for size in place.shape] for place in run.get_inputs()}
    found = run.run(None, {place.name: tensor.reshape(shapes[place.name]) for place, tensor in given})
    for tensor, output in zip(outputs.values(), found, strict=True):
        assert np.array_equal(tensor.ravel(), output.ravel())
    exact = {name: fractions(tensor) for name, tensor in (inputs | outputs).items()}
    assert all(value(assertion.expr, exact) for assertion in parsed.assertions)


def query(assertions: str, inputs="X float32 [1,1]", outputs="Y float32 [1,1]") -> str:
    declared = "".join(f"(declare-{what} {one})" for what, all in (("input", inputs), ("output", outputs))
                       for one in all.split("; "))  # fmt: skip
    if outputs.startswith("Y ") and "Y[" not in assertions:  # a query has to constrain an output
        assertions += "(assert (<= Y[0,0] 1000000.0))"
    return f"(vnnlib-version <2.0>)\n(declare-network f {declared})\n{assertions}\n"


def interval(low, high, name="X[0,0]") -> str:
    return f"(assert (and (>= {name} {low}) (<= {name} {high})))\n"


@pytest.fixture
def ask(tmp_path):
    """The answer on a query about a network in a file; a counterexample must be accepted by the competition's rules."""

    def ask(text: str, network: Path, **options) -> Answer:
        (tmp_path / "q.vnnlib").write_text(text)
        found = answer(network, tmp_path / "q.vnnlib", results=tmp_path / "result.txt", **({"timeout": 20.0} | options))
        result = (tmp_path / "result.txt").read_text()
        if found.word == "violated":
            assert_accepted(result, text, network)
        else:
            assert result == {"holds": "unsat", "timeout": "timeout", "unknown": "unknown"}[found.word] + "\n"
        return found

    return ask


@pytest.mark.parametrize("arithmetic", ["nearest", "real", "float32"])
def test_words(ask, tmp_path, arithmetic):
    """Of 1 - 4 |x - 0.3|."""
    network = save_network(tmp_path / "n.onnx", TENT)
    for height, word in (("1.001", "holds"), ("0.999", "violated")):
        asked = query(interval("0.0", "1.0") + f"(assert (> Y[0,0] {height}))")
        assert ask(asked, network, arithmetic=arithmetic).word == word
    either = query(interval("0.0", "1.0") + "(assert (or (>= Y[0,0] 1.1) (and (!= X[0,0] 0.5) (< Y[0,0] -1.7))))")
    assert ask(either, network, arithmetic=arithmetic).word == "violated"
    equal = query(interval("0.0", "1.0") + "(assert (== (+ Y[0,0] 2.0) (* 2.0 1.75)))")
    assert ask(equal, network, arithmetic=arithmetic).word == "holds"


def test_ties(ask, tmp_path):
    """Of the identity: at the end of the box, and on the whole diagonal."""
    network = save_network(tmp_path / "n.onnx", IDENTITY)
    for strict, closed in (("(> Y[0,0] 1.0)", "(>= Y[0,0] 1.0)"), ("(< Y[0,0] X[0,0])", "(<= Y[0,0] X[0,0])")):
        found = ask(query(interval("0.0", "1.0") + f"(assert {strict})"), network, timeout=4.0)
        assert (found.word, found.reason) == ("unknown", ONLY_TIES)
        assert ask(query(interval("0.0", "1.0") + f"(assert {closed})"), network).word == "violated"
    assert ask(query(interval("0.0", "1.0") + "(assert (!= Y[0,0] X[0,0]))"), network, timeout=2.0).word == "unknown"
    assert ask(query(interval("0.0", "1.0") + "(assert (!= Y[0,0] 0.5))"), network).word == "violated"


def test_inputs_tied_to_outputs_and_to_each_other(ask, tmp_path):
    """Of (x + y, relu(x - y)) over a polytope in the unit square."""
    layers = [([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], [0.0] * 3), ([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0.0] * 2)]
    network = save_network(tmp_path / "n.onnx", layers)
    square = interval("0.0", "1.0", "X[0,0]") + interval("0.0", "1.0", "X[0,1]")
    half = square + "(assert (<= (+ X[0,0] X[0,1]) 1.0))"
    cases = {
        half + "(assert (>= Y[0,0] 1.001))": "holds",
        half + "(assert (>= Y[0,0] 0.999))": "violated",
        half + "(assert (>= Y[0,0] 0.5))(assert (<= X[0,1] (* 0.25 X[0,0])))(assert (<= Y[0,1] 0.25))": "holds",
        half + "(assert (>= Y[0,0] 0.5))(assert (<= X[0,1] (* 0.25 X[0,0])))(assert (<= Y[0,1] 0.31))": "violated",
        square + "(assert (> (- Y[0,0] X[0,0] X[0,1]) 0.0001))": "holds",
        square + "(assert (> (- Y[0,0] X[0,0]) 0.9))": "violated",
        square + "(assert (<= X[0,0] X[0,1]))(assert (>= Y[0,1] 0.001))": "holds",
        square + "(assert (== X[0,0] X[0,1]))(assert (<= Y[0,1] 3.0))": "violated",
        square + "(assert (and (> X[0,0] X[0,1]) (< X[0,0] X[0,1]) (<= Y[0,1] 3.0)))": "holds",
        square
        + "(assert (and (> X[0,0] X[0,1]) (< (+ X[0,0] Y[0,1]) X[0,1])))": "unknown",  # closed, the diagonal is left
    }
    for text, word in cases.items():
        asked = query(text, "X float32 [1,2]", "Y float32 [1,2]")
        assert ask(asked, network, timeout=3.0 if word == "unknown" else 20.0).word == word, text
    first = save_property(tmp_path / "first.vnnlib", "(assert (and (>= X_0 0) (<= X_0 1) (>= X_1 0) (<= X_1 1)"
                          " (<= (+ X_0 X_1) 1) (>= Y_0 1.001)))", 2, 2)  # fmt: skip
    assert answer(network, first, 20.0).word == "holds"


def test_a_wide_network_with_tied_inputs(ask, tmp_path):
    """Splits on neurons: 24 inputs vary."""
    draw = np.random.default_rng(0)
    layers = [(draw.normal(size=(12, 24)) / 5, [0.0] * 12), (draw.normal(size=(2, 12)) / 3, [0.0] * 2)]
    network = save_network(tmp_path / "n.onnx", layers)
    box = "".join(interval("-0.2", "0.2", f"X[{i}]") for i in range(24)) + "(assert (<= X[0] X[1]))"
    for least, word in (("5.0", "holds"), ("0.01", "violated")):
        asked = query(box + f"(assert (>= (+ Y[0] X[0]) (+ Y[1] {least})))", "X real [24]", "Y real [2]")
        assert ask(asked, network).word == word


def two_of_each(path: Path, kinds=(TensorProto.FLOAT,) * 2, old: bool = False) -> Path:
    """(relu(w a) + b, the sum of b), of a (1, 2, 2) and b (1, 3); old files list weights as inputs."""
    weights = {"w": np.arange(12, dtype=np.float32).reshape(4, 3) / 8 - 0.5, "c": np.ones((3, 1), np.float32),
               "s": np.array([1, 4], np.int64)}  # fmt: skip
    nodes = [
        helper.make_node("Reshape", ["a", "s"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]), helper.make_node("Add", ["r", "b"], ["first"]),
        helper.make_node("MatMul", ["b", "c"], ["second"]),
    ]  # fmt: skip
    ends = {"a": ["batch", 2, 2], "b": [1, 3], "first": [1, 3], "second": [1, 1]}
    types = dict(zip(ends, (*kinds, *kinds)))
    infos = [helper.make_tensor_value_info(name, types[name], shape) for name, shape in ends.items()]
    given = [numpy_helper.from_array(weight, name) for name, weight in weights.items()]
    listed = [helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in given] if old else []
    graph = helper.make_graph(nodes, "two", listed[:1] + infos[:2] + listed[1:], infos[2:], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=3 if old else 8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("old", [False, True])
def test_several_inputs_and_outputs_of_one_network(ask, tmp_path, old):
    network = two_of_each(tmp_path / "n.onnx", old=old)
    read = read_onnx(network)
    assert (read.shape, read.outputs) == (torch.Size([7]), 4)
    assert [(given.name, given.shape) for given in read.inputs] == [("a", (1, 2, 2)), ("b", (1, 3))]
    assert read.computed == ((1, 3), (1, 1))
    point = torch.randn(7, generator=torch.Generator().manual_seed(0))
    run = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    found = run.run(None, {"a": point[:4].reshape(1, 2, 2).numpy(), "b": point[4:].reshape(1, 3).numpy()})
    expected = torch.from_numpy(np.concatenate([output.ravel() for output in found]))
    torch.testing.assert_close(read.module(point[None])[0], expected)
    for run in replay_session(onnx.load(network))(point):
        torch.testing.assert_close(run, expected)

    tensors = ("A float32 [1,2,2]; b float32 [3]", "P float32 [1,3]; q float32 []")
    box = "".join(interval("-1.0", "1.0", f"A[0,{i},{j}]") for i in range(2) for j in range(2))
    box += "".join(interval("-1.0", "0.5", f"b[{i}]") for i in range(3))
    largest = float(np.abs(np.arange(12).reshape(4, 3) / 8 - 0.5)[:, 2].sum()) + 0.5
    for assertion, word in {
        f"(>= P[0,2] {largest + 0.001})": "holds",
        f"(>= P[0,2] {largest - 0.001})": "violated",
        "(> q 1.5001)": "holds",
        "(and (> q 1.4) (< (+ b[0] P[0,0]) 1.1))": "violated",
        "(< P[0,1] b[1])": "unknown",  # relu is 0 in places: a tie
    }.items():
        asked = query(box + f"(assert {assertion})", *tensors)
        assert ask(asked, network, timeout=20.0 if word != "unknown" else 3.0).word == word, assertion


WRONG = {
    "b float32 [3]": (
        ("b float32 [3]; A float32 [2,2]", "P float32 [3]; q float32 []"),
        "real: float32 [1, 2, 2], float32 [",
    ),
    "X float32 [7]": (("X float32 [7]", "P float32 [3]; q float32 []"), "real: float32 [1, 2, 2], float32 ["),
    "q float32 [1]": (
        ("A float32 [2,2]; b float32 [3]", "q float32 [1]; P float32 [3]"),
        "the network's outputs",
    ),
    "P float32 [4]": (("A float32 [2,2]; b float32 [3]", "P float32 [4]"), "float32 [1, 3], float32 [1, 1]"),
}


@pytest.mark.parametrize("found", WRONG)
def test_tensors_that_are_not_the_networks(tmp_path, found):
    tensors, accepted = WRONG[found]
    declared = [one.split(" ") for one in tensors[0].split("; ")]
    names = [(name, shape) for name, _, shape in declared]
    box = ""
    for name, shape in names:
        sizes = json.loads(shape)
        box += "".join(interval("0.0", "1.0", f"{name}{list(index)}") for index in np.ndindex(*sizes))
    (tmp_path / "q.vnnlib").write_text(query(box + "(assert (<= 0.0 1.0))", *tensors))
    with pytest.raises(InputError) as error:
        answer(two_of_each(tmp_path / "n.onnx"), tmp_path / "q.vnnlib", 20.0)
    assert f"q.vnnlib, line 2: found {found!r}; accepted: " in str(error.value) and accepted in str(error.value)


def test_element_types_that_are_not_the_networks(ask, tmp_path):
    mixed = two_of_each(tmp_path / "mixed.onnx", (TensorProto.FLOAT, TensorProto.DOUBLE))
    with pytest.raises(InputError, match="float64"):
        read_onnx(mixed)
    model = onnx.load(save_network(tmp_path / "n.onnx", IDENTITY))
    for place in (*model.graph.input, *model.graph.output):
        place.type.tensor_type.elem_type = TensorProto.DOUBLE
    for weight in model.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float64), weight.name))
    onnx.save(model, tmp_path / "n.onnx")
    box = interval("0.0", "1.0")
    assert ask(query(box + "(assert (> Y[0,0] 1.01))", "X real [1]", "Y real [1]").replace("[0,0]", "[0]"),
               tmp_path / "n.onnx").word == "holds"  # fmt: skip
    with pytest.raises(InputError, match=r"found 'X float32 \[1,1\]'; accepted: .*float64 \[1, 1\]"):
        ask(query(box), tmp_path / "n.onnx")


def random_term(draw: random.Random, depth: int = 0) -> str:
    kind = draw.random()
    if kind < 0.6 or depth > 2:
        return draw.choice(["X[0,0]", "X[0,1]", "Y[0,0]", "Y[0,1]", f"{draw.randint(-4, 4) / 2:.1f}"])
    if kind < 0.8:
        return f"(* {draw.randint(-4, 4) / 2:.1f} {random_term(draw, depth + 1)})"
    return f"({draw.choice('+-')} {random_term(draw, depth + 1)} {random_term(draw, depth + 1)})"


def random_formula(draw: random.Random, depth: int = 0) -> str:
    if depth > 1 or draw.random() < 0.4:
        sign = draw.choice(["<=", ">=", "<", ">", "<=", ">=", "==", "!="])
        name = draw.choice(["X[0,0]", "X[0,1]", "Y[0,0]", "Y[0,1]"])
        return f"({sign} {name} (+ {random_term(draw)} {draw.randint(-6, 6) / 4:.2f}))"
    parts = " ".join(random_formula(draw, depth + 1) for _ in range(draw.randint(2, 3)))
    return f"({draw.choice(['and', 'and', 'or'])} {parts})"


def test_no_answer_is_contradicted_by_a_point(ask, tmp_path):
    """Random queries: where one holds, no point of a grid of eighths satisfies it in exact arithmetic."""
    axis = np.linspace(-1, 1, 17, dtype=np.float32)
    points, words = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 1, 2), set()
    for seed in range(24):
        draw, weights = random.Random(seed), np.random.default_rng(seed)
        layers = [(weights.integers(-2, 3, (k, n)), weights.integers(-2, 3, k) / 2) for k, n in ((6, 2), (2, 6))]
        network = save_network(tmp_path / "n.onnx", layers)
        box = interval("-1.0", "1.0", "X[0,0]") + interval("-1.0", "1.0", "X[0,1]")
        formula = ""
        while "Y" not in formula:
            formula = random_formula(draw)
        text = query(box + f"(assert {formula})", "X float32 [1,2]", "Y float32 [1,2]")
        found = ask(text, network, timeout=2.0, arithmetic=draw.choice(["nearest", "real", "float32"]))
        words.add(found.word)
        if found.word == "holds":
            run = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
            asserted = vnnlib.parse_query_string(text).assertions
            for point in points:
                exact = {"X": fractions(point), "Y": fractions(run.run(None, {"x": point})[0])}
                assert not all(value(assertion.expr, exact) for assertion in asserted), (seed, point)
    assert {"holds", "violated"} <= words


def test_the_command_line_and_a_table_take_both_versions(tmp_path, capsys):
    save_network(tmp_path / "n.onnx", IDENTITY)
    text = query(interval("0.0", "1.0") + "(assert (>= Y[0,0] 2.0))")
    (tmp_path / "second.vnnlib").write_text(text)
    (tmp_path / "packed.vnnlib.gz").write_bytes(gzip.compress(text.replace("(>= Y", "(<= Y").encode()))
    (tmp_path / "repaired.vnnlib").write_text(text.replace("<2.0>", "2.0"))
    (tmp_path / "bad.vnnlib").write_text(text.replace("Y[0,0]", "Y[0,-1]"))
    save_property(tmp_path / "first.vnnlib", "(assert (and (>= X_0 0) (<= X_0 1) (>= Y_0 2)))")
    names = ["first", "second", "packed", "repaired", "bad"]
    (tmp_path / "t.csv").write_text("".join(f"n.onnx,{name}.vnnlib,20\n" for name in names))
    seen: list[str] = []
    run_instances(
        tmp_path / "t.csv", tmp_path / "r.csv", records=tmp_path / "r.jsonl", watch=lambda *a: seen.append(a[2])
    )
    words = [line.split(",")[2] for line in (tmp_path / "r.csv").read_text().splitlines()]
    assert words == ["unsat", "unsat", "sat", "unsat", "error"]
    assert "line 1: found '2.0', read as" in seen[3] and "found '[0,-1]'" in seen[4]
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [record["remark"] is not None for record in records] == [False, False, False, True, False]

    capsys.readouterr()
    for name, said in (("second", ""), ("repaired", "remark: ")):
        asked = ["verify", "--onnx", str(tmp_path / "n.onnx"), "--vnnlib", str(tmp_path / f"{name}.vnnlib")]
        assert main(asked) == 0
        out, err = capsys.readouterr()
        assert out == "holds\n" and err.startswith(said) and len(err.splitlines()) == bool(said)
    assert main(["verify", "--onnx", str(tmp_path / "n.onnx"), "--vnnlib", str(tmp_path / "bad.vnnlib")]) == 2
    out, err = capsys.readouterr()
    assert out == "error\n" and "bad.vnnlib, line 4: found '[0,-1]'; accepted: " in err
