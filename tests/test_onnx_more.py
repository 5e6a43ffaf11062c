"""ONNX operators of constants and computed values, of quantised values, sums of norms, and graphs of float64."""

import numpy as np
import pytest
import torch
from onnx import TensorProto
from test_onnx_network import IMAGE, ROW, Graph, agrees, dense, integers, read, weights  # noqa: F401  # a fixture
from walking import walk

from certtrain.bounds import UnsupportedOperation
from certtrain.bounds.operations import Convolution
from certtrain.errors import InputError
from certtrain.verifiers.onnx_network import read_onnx, replay_session
from certtrain.verifiers.vnncomp import answer


def quotient(*shape):
    """A constant, as large as the value or wider, over a value above 1."""

    def build(graph):
        below = graph("Add", graph("Relu", dense(graph, "x", 5, 4)), np.float32(1))
        return graph("Flatten", graph("Div", weights(*shape), below))

    return build


def matrices(*shape, left=False, of=ROW):
    """The product with several constant matrices, on either side."""

    def build(graph):
        y = graph("Relu", graph("Neg", graph("MatMul", weights(5, 5), "x") if len(of) > 2 else "x"))
        product = graph("MatMul", weights(*shape), y) if left else graph("MatMul", y, weights(*shape))
        return graph("Flatten", product)

    return build


def reduced(kind, axes, keepdims=1, above=0.0):
    def build(graph):
        x = graph("Add", "x", np.float32(above))
        axes_given = [integers(*axes)] if kind == "ReduceSum" else []
        x = graph(kind, x, *axes_given, **({} if axes_given else {"axes": axes}), keepdims=keepdims)
        return graph("Flatten", x) if keepdims else graph("Reshape", x, integers(1, -1))

    return build


def widened(kind, *constants):
    def build(graph):
        return graph("Flatten", graph(kind, graph("Add", "x", np.float32(1)), *constants))

    return build


def quantised(offset, scale=0.1, **options):
    """Twice rounded, with entries moved in between."""

    def build(graph):
        constants = (np.asarray(scale, np.float32), np.asarray(offset))
        x = graph("QuantizeLinear", dense(graph, "x", 5, 4), *constants, **options)
        x = graph("DequantizeLinear", graph("Identity", x), *constants, **options)
        x = graph("QuantizeLinear", graph("Mul", x, weights(4)), np.float32(0.05), np.int8(-7))
        x = graph("Gather", graph("Transpose", graph("Reshape", x, integers(2, 2))), integers(1, 0), axis=0)
        return graph("Reshape", graph("DequantizeLinear", x, np.float32(0.05), np.int8(-7)), integers(1, 4))

    return build


def scattered(graph):
    graph.opset = 10
    return graph("Scatter", "x", integers(3, 1)[None], weights(1, 2), axis=1)


NETWORKS = {
    "quotient": (quotient(4), ROW),
    "quotient that widens": (quotient(3, 4), ROW),
    "matrices": (matrices(2, 5, 3, of=[1, 2, 5, 4]), [1, 2, 5, 5]),
    "matrices of one row": (matrices(3, 5, 2), ROW),
    "matrices of a vector": (matrices(3, 5, 2), [5]),
    "matrices on the left": (matrices(2, 3, 5, left=True, of=IMAGE), [1, 2, 5, 4]),
    "matrices on the left of a vector": (matrices(3, 2, 5, left=True), [5]),
    "matrices for each channel": (matrices(1, 2, 5, 3, of=IMAGE), [1, 2, 5, 5]),
    "matrices that widen": (matrices(3, 2, 4, 3, of=IMAGE), [1, 2, 5, 4]),
    "sum of sizes": (reduced("ReduceL1", [1, -1]), IMAGE),
    "norm": (reduced("ReduceL2", [1], keepdims=0, above=1.0), IMAGE),
    "sum of squares": (reduced("ReduceSumSquare", [2]), IMAGE),
    "log of a sum": (reduced("ReduceLogSum", [1], above=1.0), IMAGE),
    "larger than a wider constant": (widened("Max", weights(3, 5) + 1), ROW),
    "smaller than a wider constant": (widened("Min", weights(3, 1) + 1), ROW),
    "powers of a wider exponent": (widened("Pow", np.full((3, 1), 2, np.float32)), ROW),
    "quantised": (quantised(np.int8(3)), ROW),
    "quantised, unsigned": (quantised(np.uint8(100)), ROW),
    "quantised by columns": (quantised(np.array([1, -2, 3, 0], np.int8), [0.1, 0.2, 0.05, 0.3], axis=1), ROW),
    "scattered": (scattered, ROW),
}


@walk("name", NETWORKS)
def test_numbers_and_bounds(read, name):  # noqa: F811
    build, shape = NETWORKS[name]
    for seed in range(2):
        graph = Graph(shape)
        agrees(read(graph.model(build(graph))), seed)


def test_matrices_are_one_layer(read):  # noqa: F811
    graph = Graph(ROW)
    network = read(graph.model(matrices(3, 5, 2)(graph)))
    assert sum(isinstance(operation, Convolution) for operation in network.module.operations) == 1


def wide(shape=(4, 3)):
    """A graph of float64 whose weights float32 does not hold."""
    graph = Graph([1, 4], TensorProto.DOUBLE)
    matrix = np.random.default_rng(0).normal(size=shape)
    x = graph("Relu", graph("MatMul", "x", matrix))
    x = graph("Sub", graph("Add", x, np.full(3, 0.1)), graph("Mul", x, np.full((), 1 + 1e-6)))
    model = graph.model(x)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    return model


@walk("kind", ["Add", "Relu"])
def test_arithmetic_of_integers_is_refused(read, kind):  # noqa: F811
    """It rounds or overflows: 100 + 100 is -56 in int8."""
    graph = Graph(ROW)
    graph.opset = 14
    x = graph("QuantizeLinear", "x", np.float32(0.01), np.int8(0))
    x = graph(kind, *[x] * (1 + (kind == "Add")), name="here")
    with pytest.raises(UnsupportedOperation, match=rf"{kind} 'here': found an input of int8; accepted: floats"):
        read(graph.model(graph("DequantizeLinear", x, np.float32(0.01), np.int8(0))))


def test_weights_of_float64_stay_exact(tmp_path):
    """x + 0.1 - (1 + 1e-6) x in both, to the last bits of float64."""
    path = tmp_path / "a.onnx"
    path.write_bytes(wide().SerializeToString())
    network = read_onnx(path)
    assert network.dtype == torch.float64
    x = torch.rand(1, 4)
    ours, theirs = network.module(x.double()), replay_session(network.model)(x[0])
    torch.testing.assert_close(ours.expand_as(theirs), theirs, rtol=0, atol=1e-15)


def properties(level):
    """The first output is at most ``level`` nowhere."""
    lines = [f"(declare-const X_{i} Real)" for i in range(4)] + [f"(declare-const Y_{i} Real)" for i in range(3)]
    lines += [f"(assert (>= X_{i} -1)) (assert (<= X_{i} 1))" for i in range(4)]
    return "\n".join([*lines, f"(assert (<= Y_0 {level}))"])


@pytest.mark.parametrize("level, word", [(0.09, "holds"), (0.11, "violated")])
def test_properties_of_float64(tmp_path, level, word):
    path = tmp_path / "a.onnx"
    path.write_bytes(wide().SerializeToString())
    (tmp_path / "a.vnnlib").write_text(properties(level))
    assert answer(path, tmp_path / "a.vnnlib", 30).word == word


def test_exact_arithmetics_refuse_float64(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(wide().SerializeToString())
    property = tmp_path / "a.vnnlib"
    property.write_text(properties(0.09))
    with pytest.raises(InputError, match=r"arithmetic real: found .*float64; accepted"):
        answer(path, property, 30, arithmetic="real")


WAYS = {
    "ArgMin": "a network that ends before it (onnx.utils.extract_model) and a property that compares its scores",
    "Einsum": "MatMul, Mul and ReduceSum",
}


@walk("kind, way", WAYS.items())
def test_a_refusal_names_the_way_out(read, kind, way):  # noqa: F811
    graph = Graph(ROW)
    x = graph(kind, "x", name="here", **({"equation": "ij->ji"} if kind == "Einsum" else {}))
    x = graph("Cast", x, to=TensorProto.FLOAT)
    with pytest.raises(UnsupportedOperation) as caught:
        read(graph.model(x))
    assert f"{kind} 'here': found an operator without a bound rule; accepted: {way}; or " in str(caught.value)


REFUSED = {
    "a wide quantisation": (lambda graph: graph("QuantizeLinear", "x", np.float32(0.1), np.int16(0)), "int8, uint8"),
    "a scale below 0": (lambda graph: graph("QuantizeLinear", "x", np.float32(-0.1), np.int8(0)), "scales > 0"),
}


@walk("name", REFUSED)
def test_quantisations_that_are_refused(read, name):  # noqa: F811
    build, accepted = REFUSED[name]
    graph = Graph(ROW)
    graph.opset = 21
    x = graph("DequantizeLinear", build(graph), np.float32(0.1), np.int16(0) if "wide" in name else np.int8(0))
    with pytest.raises(UnsupportedOperation, match=f"QuantizeLinear.*accepted: .*{accepted}"):
        read(graph.model(x, ir=10))
