"""ONNX operators on several computed values, reductions and softmax: numbers, bounds and refusals."""

import numpy as np
import onnxruntime
import pytest
import torch
from test_onnx_network import IMAGE, ROW, Graph, agrees, dense, integers, read, the_same_weights, weights
from walking import walk

from certtrain.bounds import UnsupportedOperation
from certtrain.bounds.folding import fold
from certtrain.bounds.rounding import check
from certtrain.errors import InputError

__all__ = ["read", "the_same_weights"]  # fixtures


def shaped(graph, shape, factor=1.0, x="x", size=None):
    """A layer on everything, and its outputs in a shape."""
    size = size or int(np.prod([end.dim_value for end in graph.inputs[0].type.tensor_type.shape.dim]))
    x = graph("Reshape", x, integers(1, -1))
    x = graph("MatMul", x, np.float32(factor) * weights(size, int(np.prod(shape))))
    return graph("Reshape", x, integers(*shape))


def of_two(kind, first, second, offset=0.0, order=1):
    def build(graph):
        pair = [shaped(graph, first), graph("Add", graph("Sigmoid", shaped(graph, second)), np.float32(offset))]
        return graph(kind, *pair[::order])

    return build


def matrices(first, second):
    return lambda graph: graph("MatMul", shaped(graph, first), shaped(graph, second))


def variadic(kind, *constants):
    def build(graph):
        values = [shaped(graph, shape) for shape in ((2, 3), (1, 3), (2, 1), (3,))]
        return graph(kind, *values, *constants)

    return build


def reduced(kind, *, opset=13, axes=None, **attributes):
    def build(graph):
        graph.opset = opset
        more = {"axes": axes} if opset < 18 and axes is not None else {}
        known = [integers(*axes)] if opset >= 18 and axes is not None else []
        return graph(kind, shaped(graph, (2, 3, 4), 2.0), *known, **more, **attributes)

    return build


def soft(kind, shape, opset, factor=3.0, **attributes):
    def build(graph):
        graph.opset = opset
        return graph(kind, shaped(graph, shape, factor), **attributes)

    return build


def widened(kind, constant, shape):
    return lambda graph: graph("Relu", graph(kind, shaped(graph, shape), constant))


def attention(graph):
    """softmax(q k^T / 2) v over two heads, and a sum of all."""
    q, k, v = (shaped(graph, (1, 2, 5, 4), 2.0) for _ in range(3))
    scores = graph("Div", graph("MatMul", q, graph("Transpose", k, perm=[0, 1, 3, 2])), np.float32(2))
    y = graph("MatMul", graph("Softmax", scores, axis=-1), v)
    y = graph("Reshape", graph("Transpose", y, perm=[0, 2, 1, 3]), integers(1, 40))
    return dense(graph, y, 40, 3)


NETWORKS = {
    "product": (of_two("Mul", (1, 3, 4), (1, 3, 4)), ROW),
    "product of rows": (of_two("Mul", (2, 3), (2, 3)), ROW),
    "product of channels": (of_two("Mul", (1, 2, 3, 3), (1, 2, 1, 1)), IMAGE),
    "product that widens both": (of_two("Mul", (3, 1), (1, 4)), ROW),
    "product of ranks": (of_two("Mul", (4,), (2, 3, 4)), ROW),
    "square": (lambda graph: graph("Mul", y := shaped(graph, (2, 3)), y), ROW),
    "quotient": (of_two("Div", (2, 3), (2, 3), 0.5), ROW),
    "quotient of a negative": (of_two("Div", (2, 3), (2, 1), -1.5), ROW),
    "sum that widens": (of_two("Add", (2, 1), (1, 3)), ROW),
    "difference that widens": (of_two("Sub", (1, 1, 3), (1, 2, 3), order=-1), ROW),
    "matrices": (matrices((2, 3), (3, 4)), ROW),
    "batch of matrices": (matrices((1, 2, 3, 4), (1, 2, 4, 2)), ROW),
    "matrices that widen": (matrices((2, 1, 3, 4), (2, 4, 2)), ROW),
    "matrix and vector": (matrices((2, 3), (3,)), ROW),
    "vector and matrices": (matrices((3,), (2, 3, 2)), ROW),
    "vectors": (matrices((5,), (5,)), ROW),
    "sum of several": (variadic("Sum"), ROW),
    "sum with constants": (variadic("Sum", weights(3), weights(2, 2, 3)), ROW),
    "mean of several": (variadic("Mean", weights(2, 3)), ROW),
    "largest": (variadic("Max"), ROW),
    "smallest": (variadic("Min"), ROW),
    "largest of one": (lambda graph: graph("Max", shaped(graph, (1, 3))), ROW),
    "max over one": (reduced("ReduceMax", axes=[-1]), ROW),
    "max over two": (reduced("ReduceMax", axes=[0, 2], keepdims=0, opset=18), ROW),
    "max over all": (reduced("ReduceMax"), ROW),
    "max over none": (reduced("ReduceMax", opset=18, noop_with_empty_axes=1), ROW),
    "min": (reduced("ReduceMin", axes=[1]), ROW),
    "min over all": (reduced("ReduceMin", opset=18, keepdims=0), ROW),
    "global maximum": (lambda graph: graph("GlobalMaxPool", graph("Neg", "x")), IMAGE),
    "mean over the first": (reduced("ReduceMean", axes=[0, -1], opset=18), ROW),
    "log of a sum": (reduced("ReduceLogSumExp", axes=[2]), ROW),
    "log of the sum of all": (reduced("ReduceLogSumExp", opset=18, keepdims=0), ROW),
    "softmax": (soft("Softmax", (1, 4), 13), ROW),
    "softmax of rows": (soft("Softmax", (2, 3, 4), 13), ROW),
    "softmax of columns": (soft("Softmax", (2, 3, 4), 13, axis=1), ROW),
    "softmax along the first": (soft("Softmax", (3, 4), 13, axis=0), ROW),
    "softmax along the batch": (soft("Softmax", (1, 4), 13, axis=0), ROW),
    "softmax of a vector": (soft("Softmax", (4,), 13), ROW),
    "old softmax": (soft("Softmax", (1, 2, 3), 11), ROW),
    "old softmax from the last": (soft("Softmax", (2, 2, 3), 9, axis=2), ROW),
    "old softmax from the first": (soft("Softmax", (2, 3), 11, axis=0), ROW),
    "sharp softmax": (soft("Softmax", (1, 5), 13, 100.0), ROW),
    "log_softmax": (soft("LogSoftmax", (2, 3), 13), ROW),
    "old log_softmax": (soft("LogSoftmax", (1, 2, 3), 12), ROW),
    "constant that widens": (widened("Add", weights(3, 5), (1, 5)), ROW),
    "factor that widens": (widened("Mul", weights(3, 4, 5), (4, 1)), ROW),
    "constant of more dimensions": (widened("Sub", weights(2, 1, 4), (3, 1)), ROW),
    "attention": (attention, IMAGE),
}  # fmt: skip


@walk("name", NETWORKS)
def test_numbers_are_onnxruntimes(read, name):
    build, shape = NETWORKS[name]
    graph = Graph(shape)
    model = graph.model(build(graph))
    network = read(model)
    agrees(network)
    factors = torch.tensor([0.0, 1e-3, 1.0, 30.0]).repeat(5)
    x = torch.rand(20, *network.shape) * factors.reshape(-1, *[1] * len(network.shape))
    with torch.no_grad():
        values = network.module.network.values(x)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for number, image in enumerate(x):
            wanted = session.run(None, {"x": image.reshape(shape).numpy()})[0].reshape(-1)
            size = max(1.0, *(float(value[number].abs().max()) for value in values))  # layers before it round, too
            np.testing.assert_allclose(values[-1][number].numpy(), wanted, rtol=0, atol=1e-6 * size)


def two_computed(op_type, *shape, constant=None):
    def build():
        graph = Graph(ROW)
        more = [constant] if constant is not None else []
        return graph.model(graph(op_type, "x", *more, name="here"))

    return build


REFUSED = {
    "several matrices": (two_computed("MatMul", constant=weights(2, 5, 3)), ["MatMul 'here'", "one matrix"]),
}


@walk("name", REFUSED)
def test_refusals_name_what_was_found(read, name):
    build, mentions = REFUSED[name]
    with pytest.raises(InputError) as caught:
        read(build())
    for mention in (*mentions, "network.onnx: ", "accepted: "):
        assert mention in str(caught.value)


@walk("name, kind", [("softmax", "softmax"), ("square", "pow"), ("matrices", "matrix product")])
def test_other_arithmetics_refuse_them_by_name(read, name, kind):
    build, shape = NETWORKS[name]
    graph = Graph(shape)
    network = read(graph.model(build(graph)))
    with pytest.raises(UnsupportedOperation, match=rf"found {kind}.*accepted in this arithmetic"):
        check(fold(network.module, network.shape, dtype=torch.float64))
