"""ONNX operators that normalise by a value's own statistics: numbers and bounds."""

import numpy as np
import onnxruntime
import pytest
import torch
from test_onnx_network import Graph, agrees, integers, read, the_same_weights, weights
from test_onnx_products import ROW, shaped
from torch import Tensor
from walking import walk

from certtrain.bounds import LinfBall, compute_bounds
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import Centering, CenteringOnce, Quotient, RowNorm
from certtrain.errors import InputError

__all__ = ["read", "the_same_weights"]  # fixtures


def norm(kind, shape, opset, *sizes, **attributes):
    def build(graph):
        graph.opset = opset
        return graph(kind, shaped(graph, shape, 2.0), *[weights(*size) for size in sizes], **attributes)

    return build


def chain(graph, x, *, axes=(-1,), opset=13, power=True, root="Sqrt", inverse=False, eps=0.01, centered=True, sums=0):
    """A layer norm as files below opset 17 spell it out, before the weights."""
    graph.opset = opset
    more = {"axes": axes} if opset < 18 else {}
    known = [integers(*axes)] if opset >= 18 else []
    if centered:
        x = graph("Sub", x, graph("ReduceMean", x, *known, **more))
    square = graph("Pow", x, np.float32(2)) if power else graph("Mul", x, x)
    if sums:
        size = graph("Mul", graph("ReduceSum", square, integers(-1)), np.float32(1 / sums))
    else:
        size = graph("ReduceMean", square, *known, **more)
    size = graph("Add", size, np.float32(eps))
    size = graph("Sqrt", size) if root == "Sqrt" else graph("Pow", size, np.float32(0.5))
    return graph("Mul", graph("Reciprocal", size), x) if inverse else graph("Div", x, size)


def spelled(shape=(1, 3, 4), factor=2.0, **options):
    def build(graph):
        y = chain(graph, shaped(graph, shape, factor), **options)
        return graph("Add", graph("Mul", y, weights(shape[-1])), weights(shape[-1]))

    return build


CHAINS = {
    "chain": (spelled(), ROW),
    "chain of opset 18": (spelled(opset=18), ROW),
    "chain with products": (spelled(power=False, root="Pow"), ROW),
    "chain with a reciprocal": (spelled(power=False, inverse=True), ROW),
    "chain without a mean": (spelled(centered=False), ROW),
    "chain of sums": (spelled(sums=4), ROW),
    "chain of a vector": (spelled((1, 6)), ROW),
}
COMPOSED = {
    "chain over two dimensions": (spelled((2, 3, 4), axes=(-2, -1)), ROW),
    "chain over another dimension": (spelled((1, 4, 4), axes=(1,)), ROW),
    "half a sum": (spelled(sums=8), ROW),
}
NETWORKS = {
    **CHAINS,
    **COMPOSED,
    "euclidean norm": (norm("LpNormalization", (1, 3, 4), 13), ROW),
    "euclidean norm of columns": (norm("LpNormalization", (2, 3, 4), 13, axis=1, p=2), ROW),
    "euclidean norm of a vector": (norm("LpNormalization", (5,), 13, axis=0), ROW),
    "layer norm": (norm("LayerNormalization", (1, 3, 4), 17, (4,), (4,), epsilon=0.01), ROW),
    "layer norm without bias": (norm("LayerNormalization", (2, 3, 4), 17, (3, 4), axis=1, epsilon=0.1), ROW),
    "layer norm of all": (norm("LayerNormalization", (2, 4), 17, (2, 4), (2, 4), axis=0, epsilon=0.1), ROW),
    "layer norm of a vector": (norm("LayerNormalization", (5,), 17, (5,), epsilon=0.1), ROW),
    "instance norm": (norm("InstanceNormalization", (1, 2, 3, 2), 13, (2,), (2,), epsilon=0.1), ROW),
    "group norm": (norm("GroupNormalization", (1, 4, 3), 21, (4,), (4,), num_groups=2, epsilon=0.1), ROW),
    "rms norm": (norm("RMSNormalization", (1, 3, 4), 23, (4,), epsilon=0.1), ROW),
}


@walk("name", NETWORKS)
def test_numbers_are_onnxruntimes(read, name):
    build, shape = NETWORKS[name]
    graph = Graph(shape)
    model = graph.model(build(graph), ir=11 if graph.opset > 21 else 10)
    agrees(read(model))


def test_an_epsilon_of_zero_is_refused(read):
    graph = Graph(ROW)
    graph.opset = 17
    y = graph("LayerNormalization", "x", np.ones(5, np.float32), name="here", epsilon=0.0)
    with pytest.raises(InputError, match=r"LayerNormalization 'here': found epsilon=0.0; accepted: "):
        read(graph.model(y))


@walk("name", CHAINS)
def test_chains_are_recognised(read, name):
    build, shape = CHAINS[name]
    graph = Graph(shape)
    network = read(graph.model(build(graph)))
    kinds = {type(operation) for operation in network.module.network.operations}
    assert RowNorm in kinds and Quotient not in kinds
    assert (CenteringOnce in kinds) == (name != "chain without a mean")


@walk("name", COMPOSED)
def test_other_chains_are_read_operator_by_operator(read, name):
    build, shape = COMPOSED[name]
    graph = Graph(shape)
    kinds = {type(operation) for operation in read(graph.model(build(graph))).module.network.operations}
    assert RowNorm not in kinds and Quotient in kinds


def test_a_chain_written_twice_is_the_fused_operators_centering(read):
    graph = Graph(ROW)
    x = shaped(graph, (1, 3, 4))
    x = graph("Sub", x, graph("ReduceMean", x, axes=(-1,)))
    network = read(graph.model(chain(graph, x))).module.network
    assert any(isinstance(operation, Centering) for operation in network.operations)


def run(model, images: Tensor, level: str) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.stack([torch.from_numpy(session.run(None, {"x": x[None].numpy()})[0]).flatten() for x in images])


def test_bounds_of_constant_rows_hold_with_and_without_fusion(read):
    """The same file gives outputs that are 1e-2 apart at onnxruntime's optimisation levels: bounds contain both."""
    graph = Graph((1, 48))
    graph.opset = 13
    x = graph("Mul", graph("Reshape", "x", integers(1, 1, 48)), np.float32(1000))
    y = graph("Add", graph("Mul", chain(graph, x, eps=1e-5), np.float32([2] * 48)), np.float32([0.5] * 48))
    model = graph.model(graph("Reshape", y, integers(1, 48)))
    network, images = read(model), torch.rand(20, 1).expand(20, 48).contiguous()
    plain, fused = (run(model, images, level) for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"))
    assert (plain - fused).abs().max() > 1e-3
    region, forms = LinfBall(0.0).region(images), torch.eye(48).expand(20, 48, 48)
    folded, interval = fold(network.module, network.shape), compute_bounds(network.module, region)
    bounds = crown_bounds(folded, region)
    ends = [(interval.lower, interval.upper)]
    ends += [(bound_forms(folded, region, forms, bounds), -bound_forms(folded, region, -forms, bounds))]
    for lower, upper in ends:
        for values in (plain, fused):
            assert ((lower <= values + 1e-6) & (values <= upper + 1e-6)).all()
