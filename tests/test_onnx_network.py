"""ONNX files as programs: their numbers are onnxruntime's, one input at a time, whatever shapes the file works in."""

import gzip
import math

import numpy as np
import onnx
import onnx_moves
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomise_norms
from onnx import TensorProto, helper, numpy_helper
from scalar_functions import ROWS
from torch import nn
from walking import walk

from certtrain.bounds import Interval, LinfBall, UnsupportedOperation, compute_bounds
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import (
    Dense,
    Gelu,
    GeluTanh,
    Input,
    Operation,
    Product,
    Relu,
    Resampling,
    Silu,
    TransposedConvolution,
)  # fmt: skip
from certtrain.errors import InputError
from certtrain.verifiers.onnx_network import OnnxNetwork, read_onnx, replay_session
from certtrain.verifiers.onnx_operators import RULES

RANDOM = np.random.default_rng(0)
START = RANDOM.bit_generator.state


@pytest.fixture(autouse=True)
def the_same_weights():
    RANDOM.bit_generator.state = START


def weights(*shape: int) -> np.ndarray:
    return (RANDOM.normal(size=shape) / max(1, np.prod(shape[1:])) ** 0.5).astype(np.float32)


def integers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


class Graph:
    """A graph that is written operator by operator: inputs are names or arrays, which become initialisers."""

    def __init__(self, shape, kind=TensorProto.FLOAT):
        self.inputs = [helper.make_tensor_value_info("x", kind, shape)]
        self.nodes, self.initializers, self.opset = [], [], 13

    def __call__(self, op_type: str, *inputs, outputs=1, name="", domain="", **attributes):
        number = len(self.nodes)
        names = [value if isinstance(value, str) else f"w{number}_{i}" for i, value in enumerate(inputs)]
        self.initializers += [
            numpy_helper.from_array(np.asarray(value), known)
            for known, value in zip(names, inputs)
            if not isinstance(value, str)
        ]
        results = [f"v{number}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, names, results, name=name, domain=domain, **attributes))
        return results if outputs > 1 else results[0]

    def model(self, *outputs: str, opset=0, ir=8, listed=False) -> onnx.ModelProto:
        given_too = [helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in self.initializers]
        graph = helper.make_graph(
            self.nodes, "test", self.inputs + (given_too if listed else []),
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs], self.initializers,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", opset or self.opset), helper.make_opsetid("elsewhere", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)  # the checker wants shapes of outputs
        for output in model.graph.output:
            output.type.tensor_type.shape.dim.extend([])  # of what cannot be inferred: there is one, it says nothing
        return model


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"

    def read(model: onnx.ModelProto) -> OnnxNetwork:
        path.write_bytes(model.SerializeToString())
        return read_onnx(path)

    return read


def agrees(network: OnnxNetwork, seed: int = 0) -> list[Operation]:
    """Checks numbers against onnxruntime's, and that bounds enclose those; gives the network's operations."""
    replay, noise = replay_session(network.model), torch.Generator().manual_seed(seed)
    x = torch.rand(3, *network.shape, generator=noise)
    logits = torch.stack([replay(image)[0] for image in x])
    assert logits.shape == (3, network.outputs)
    size = max(logits.abs().max().item(), 0.1)
    folded, wide = fold(network.module, network.shape), fold(network.module, network.shape, dtype=torch.float64)
    with torch.no_grad():
        for rows in (3, 1, 0):
            for found in (network.module(x[:rows]), folded(x[:rows])):
                assert found.shape == (rows, network.outputs) and found.dtype == torch.float32
                torch.testing.assert_close(found, logits[:rows], rtol=0, atol=1e-5 * size)
        torch.testing.assert_close(wide(x.double()).float(), logits, rtol=0, atol=1e-4 * size)
        box = compute_bounds(network.module, Interval.box(x, 0.1))
        steps = torch.randint(-1, 2, (4, 3, *network.shape), generator=noise)
        inside = torch.stack([replay(image)[0] for image in (x + 0.1 * steps).clamp(0, 1).flatten(0, 1)]).unflatten(
            0, (4, 3)
        )
        assert (box.lower - 1e-5 * size <= inside).all() and (inside <= box.upper + 1e-5 * size).all()
        region = LinfBall(0.1).region(x.double())
        forms = torch.randn(3, 4, network.outputs, dtype=torch.float64, generator=noise)
        least = bound_forms(wide, region, forms, crown_bounds(wide, region))
        assert (least - 1e-4 * size * forms.abs().sum(-1) <= torch.einsum("brk,sbk->sbr", forms, inside.double())).all()
    return list(network.module.network.operations)


def dense(graph, x, inputs, outputs, activation=""):
    y = graph("Gemm", x, weights(outputs, inputs), weights(outputs), transB=1)
    return graph(activation, y) if activation else y


def keras(graph):
    """NHWC in, normalisation in front, Transposes around the convolution."""
    x = graph("Div", graph("Sub", "x", weights(1, 1, 1, 3)), np.float32(0.5) + abs(weights(3)))
    x = graph("Transpose", x, perm=[0, 3, 1, 2])
    x = graph("Relu", graph("Conv", x, weights(4, 3, 3, 3), weights(4), auto_pad="SAME_UPPER", strides=[2, 2]))
    x = graph("Transpose", x, perm=[0, 2, 3, 1])
    x = graph("Relu", graph("Add", x, weights(4)))
    x = graph("Reshape", x, integers(-1, 36))
    return graph("Add", graph("MatMul", x, weights(36, 5)), weights(5))


def old_torch(graph):
    """x.view(x.size(0), -1), as exporters used to write it."""
    x = graph("Relu", graph("Conv", "x", weights(4, 2, 3, 3), weights(4), pads=[1, 1, 1, 1]))
    size = graph("Unsqueeze", graph("Gather", graph("Shape", x), np.array(0), axis=0), integers(0))
    x = graph("Reshape", x, graph("Concat", size, integers(-1), axis=0))
    return dense(graph, x, 4 * 36, 3)


def residual(graph):
    x = graph("Relu", graph("Conv", "x", weights(4, 2, 3, 3), weights(4), pads=[1, 1, 1, 1]))
    y = graph("Conv", x, weights(4, 4, 3, 3), pads=[1, 1, 1, 1])
    x = graph("Sub", graph("Relu", graph("Add", y, x)), graph("Conv", x, weights(4, 4, 1, 1), weights(4)))
    return dense(graph, graph("Flatten", x), 4 * 36, 3)


def norm(graph, x, channels, **attributes):
    variance = np.float32(0.5) + abs(weights(channels))
    return graph(
        "BatchNormalization", x, weights(channels), weights(channels), weights(channels), variance, **attributes
    )


def norms(graph):
    x = graph("Relu", norm(graph, graph("Conv", "x", weights(4, 2, 3, 3)), 4, epsilon=0.1))
    x = norm(graph, graph("Flatten", x), 64)
    return dense(graph, graph("Relu", norm(graph, dense(graph, x, 64, 8), 8)), 8, 3)


def norm_of_rows(graph):
    """Channels that are not the last affine layer's outputs."""
    x = norm(graph, graph("MatMul", graph("Reshape", norm(graph, "x", 2), integers(1, 4, 18)), weights(18, 6)), 4)
    return norm(graph, graph("MatMul", graph("Reshape", x, integers(1, 2, 2, 6)), weights(6, 3)), 2)


def sums_of_rows(graph):
    """Constants that vary along more than the layer's outputs, or less: only these are biases."""
    x = graph("Add", graph("MatMul", "x", weights(5, 4)), weights(3, 4))
    return graph("Add", weights(1, 1, 1), graph("MatMul", x, weights(4, 2)))


def left_matmul(graph):
    x = graph("Relu", graph("Add", graph("MatMul", weights(6, 5), "x"), weights(6, 1)))
    return graph("MatMul", weights(3, 6), x)


def gemm(**attributes):
    def build(graph):
        matrix = weights(4, 5) if attributes.get("transB") else weights(5, 4)
        return graph("Relu", graph("Gemm", "x", matrix, weights(4), **attributes))

    return build


def gemm_of_columns(graph):
    """The constant first: x (5, 1) is transposed, then transposed back."""
    x = graph("Gemm", weights(5, 4), "x", weights(4, 1), transA=1, alpha=0.5, beta=2.0)
    return graph("Gemm", graph("Gemm", weights(3, 4), x, transB=0), weights(3, 2), weights(1), transA=1)


def arithmetic(graph):
    x = graph("Sub", weights(5), graph("Mul", weights(1, 5), "x"))
    x = graph("Neg", graph("Sub", x, np.float32(0.3)))
    return graph("Add", weights(1), graph("Mul", graph("Div", x, abs(weights(5)) + 1), weights(1, 1)))


def shared_matmul(graph):
    """The sum without bias is read as well: the bias must not become the layer's."""
    y = graph("MatMul", "x", weights(5, 4))
    return graph("Sub", graph("Relu", graph("Identity", y)), graph("Add", y, weights(4)))


def pieces(graph):
    first, second = graph("Split", "x", integers(2, 3), outputs=2, axis=1)
    whole = graph("Concat", second, weights(1, 2), first, graph("Relu", first), axis=-1)
    return graph(
        "Gather", graph("Slice", whole, integers(8), integers(0), integers(1), integers(-2)), integers(2, 0, 1), axis=1
    )


def first_split_only(graph):
    return graph("Split", "x", integers(2, 3), outputs=2, axis=1)[1]


def padded(graph):
    x = graph(
        "Pad", graph("Pad", "x", integers(0, 0, 2, 0, 0, 0, -1, 1)), integers(0, 0, 1, 1, 0, 0, 0, 0), mode="edge"
    )
    return dense(graph, graph("Flatten", x), 2 * 8 * 8, 3)


def one_dimension(graph):
    x = graph("Relu", graph("Conv", "x", weights(4, 3, 3), weights(4), pads=[1, 0], strides=[2]))
    x = norm(graph, graph("MaxPool", x, kernel_shape=[2], pads=[0, 1]), 4)
    return graph("Flatten", graph("AveragePool", x, kernel_shape=[3], pads=[1, 1], count_include_pad=1))


def without_batch(graph):
    x = graph("Relu", graph("Add", graph("MatMul", "x", weights(5, 4)), weights(4)))
    x = graph("Unsqueeze", x, integers(0, 2))
    x = graph("Reshape", graph("Squeeze", x, integers(0)), integers(2, 2))
    return graph("MatMul", graph("Transpose", x), weights(2))


def moved_batch(graph):
    """(1, 2, 6, 6), of which the batch dimension goes to the end and vanishes."""
    x = graph("Reshape", graph("Transpose", "x", perm=[3, 1, 2, 0]), integers(6, 12))
    return graph("ReduceMean", graph("Relu", graph("MatMul", x, weights(12, 4))), axes=[0], keepdims=0)


def scalar(graph):
    x = graph("Relu", graph("Squeeze", graph("MatMul", "x", abs(weights(5, 1))), integers(0, 1)))
    return graph("Tanh", graph("Sub", np.float32(1), graph("Mul", x, np.float32(2))))


def computed_constants(graph):
    two = numpy_helper.from_array(np.full(1, 2, np.float32))
    scale = graph("Sqrt", graph("ConstantOfShape", graph("Shape", "x"), value=two))
    x = graph("Mul", "x", graph("Cast", graph("Cast", scale, to=TensorProto.DOUBLE), to=TensorProto.FLOAT))
    x = graph("Dropout", graph("Cast", x, to=TensorProto.FLOAT), np.float32(0.5))
    graph.nodes[-1].output.append("")  # left out, as is the constant's lower end
    x = graph("Add", x, graph("Clip", weights(5), "", np.float32(0.1)))
    return graph("MatMul", x, graph("Transpose", weights(4, 5)))


def gelu(divisor=2**0.5, one=1.0, half=0.5):
    """As torch writes it: x * (0.5 * (1 + erf(x / sqrt(2))))."""

    def build(graph, x="x"):
        erf = graph("Erf", graph("Div", x, np.float32(divisor)))
        return graph("Mul", x, graph("Mul", np.float32(half), graph("Add", erf, np.float32(one))))

    return build


def old_gelu(graph):
    """With the half at the end, and a product instead of the division."""
    x = graph("Gemm", "x", weights(5, 5))
    gate = graph("Add", np.float32(1), graph("Erf", graph("Mul", np.float32(math.sqrt(0.5)), x)))
    return graph("MatMul", graph("Mul", graph("Mul", gate, x), np.float32(0.5)), weights(5, 3))


def gelu_by_tanh(cube=0.044715, exponent=3.0):
    def build(graph, x="x"):
        inner = graph("Add", x, graph("Mul", np.float32(cube), graph("Pow", x, np.float32(exponent))))
        gate = graph("Add", graph("Tanh", graph("Mul", np.float32(math.sqrt(2 / math.pi)), inner)), np.float32(1))
        return graph("Mul", x, graph("Mul", np.float32(0.5), gate))

    return build


def silu(graph):
    """Once as it is, once of a value whose sigmoid is read again, once with a factor."""
    x = graph("MatMul", "x", weights(5, 5))
    x = graph("Mul", x, graph("Sigmoid", x))
    gate = graph("Sigmoid", x)
    x = graph("Add", graph("Mul", gate, x), gate)
    return graph("Mul", graph("Mul", x, np.float32(-3)), graph("Sigmoid", x))


def gelu_operators(graph):
    graph.opset = 20
    return graph("Gelu", graph("Gelu", "x", approximate="tanh"))


def channels(graph):
    """Parts that are computed, with a convolution behind them: no entry is moved one by one."""
    x = graph("Relu", graph("Conv", "x", weights(3, 2, 3, 3), pads=[1] * 4))
    y = graph("Concat", "x", x, "x", axis=1)
    return graph("Concat", graph("Conv", y, weights(2, 7, 1, 1)), graph("Neg", x), axis=-3)


def rows_and_constants(graph):
    """Along the first dimension, of a file without a batch, and among constants."""
    x = graph("Concat", "x", graph("Relu", "x"), weights(2, 5), "x", axis=0)
    return graph("Concat", weights(8, 1), x, graph("Neg", x), axis=1)


def chained(*steps):
    """Each step is an operator's type and attributes, on (1, 2, 6, 6)."""

    def build(graph):
        x = "x"
        for op_type, attributes in steps:
            known = [attributes["w"]] if "w" in attributes else []
            x = graph(op_type, x, *known, **{name: value for name, value in attributes.items() if name != "w"})
        return graph("Flatten", x)

    return build


def pool(kind, **attributes):
    # of negative values, among which a padding of 0 would be the largest
    return chained(("Neg", {}), (kind, {"kernel_shape": [3, 3], **attributes}))


def conv(channels, **attributes):
    return chained(("Conv", {"w": weights(4, channels, 3, 2), **attributes}))


IMAGE, ROW = [1, 2, 6, 6], [1, 5]
NETWORKS = {
    "keras": (keras, ["batch", 6, 6, 3]),
    "old torch": (old_torch, IMAGE),
    "old torch, dynamic batch": (old_torch, ["batch", 2, 6, 6]),
    "residual": (residual, IMAGE),
    "norms": (norms, IMAGE),
    "norm of rows": (norm_of_rows, IMAGE),
    "left matmul": (left_matmul, [5, 1]),
    "left matmul of a vector": (left_matmul, [1, 5, 4]),
    "gemm": (gemm(alpha=0.7, beta=-2.0, transB=1), ROW),
    "gemm, transposed": (gemm(transA=1), [5, 1]),
    "gemm of rows": (gemm(), [3, 5]),
    "gemm of columns": (gemm_of_columns, [5, 1]),
    "gemm of several columns": (gemm_of_columns, [5, 4]),
    "arithmetic": (arithmetic, ROW),
    "arithmetic without batch": (arithmetic, [5]),
    "arithmetic of rows": (arithmetic, [1, 1, 3, 5]),
    "sums of rows": (sums_of_rows, [1, 3, 5]),
    "shared matmul": (shared_matmul, ["batch", 5]),
    "pieces": (pieces, ROW),
    "one piece": (first_split_only, ROW),
    "padded": (padded, IMAGE),
    "one dimension": (one_dimension, [1, 3, 11]),
    "without batch": (without_batch, [5]),
    "moved batch": (moved_batch, IMAGE),
    "computed constants": (computed_constants, ROW),
    "identity": (lambda graph: graph("Identity", "x"), [5]),
    "scalar": (scalar, ROW),
    "gelu": (gelu(), ROW),
    "gelu of an image": (gelu(), IMAGE),
    "gelu, old": (old_gelu, ROW),
    "gelu by tanh": (gelu_by_tanh(), ROW),
    "gelu operators": (gelu_operators, IMAGE),
    "silu": (silu, ROW),
    "channels": (channels, IMAGE),
    "rows and constants": (rows_and_constants, [2, 5]),
    "leaky": (chained(("LeakyRelu", {"alpha": 0.3}), ("LeakyRelu", {})), IMAGE),
    "sigmoid": (chained(("Sigmoid", {}), ("Tanh", {})), IMAGE),
    "global mean": (chained(("Relu", {}), ("GlobalAveragePool", {})), IMAGE),
    "mean of places": (chained(("ReduceMean", {"axes": [1, -2], "keepdims": 0})), [1, 6, 6, 2]),
    "sum of all": (lambda graph: graph("ReduceSum", "x", keepdims=0), IMAGE),
    "sum of one": (lambda graph: graph("ReduceSum", "x", integers(-1)), IMAGE),
    "depth to space": (chained(("SpaceToDepth", {"blocksize": 2}),
                               ("DepthToSpace", {"blocksize": 2, "mode": "CRD"})), IMAGE),
    "max pool": (pool("MaxPool", strides=[2, 1], pads=[1, 1, 1, 1]), IMAGE),
    "max pool, one side": (pool("MaxPool", strides=[2, 2], pads=[0, 0, 1, 2]), IMAGE),
    "max pool, dilated": (pool("MaxPool", dilations=[2, 1]), IMAGE),
    "max pool, ceil": (pool("MaxPool", strides=[2, 2], ceil_mode=1), IMAGE),
    "max pool, same": (pool("MaxPool", strides=[2, 2], auto_pad="SAME_LOWER"), IMAGE),
    "mean pool": (pool("AveragePool", strides=[2, 1], pads=[1, 1, 1, 1]), IMAGE),
    "mean pool, padding counts": (pool("AveragePool", pads=[1, 0, 2, 1], count_include_pad=1), IMAGE),
    "mean pool, same": (pool("AveragePool", strides=[2, 2], auto_pad="SAME_UPPER"), IMAGE),
    "mean pool, ceil": (pool("AveragePool", strides=[2, 2], ceil_mode=1), IMAGE),
    "mean pool, ceil, padding counts": (
        pool("AveragePool", strides=[2, 2], pads=[1] * 4, ceil_mode=1, count_include_pad=1), IMAGE),
    "groups": (conv(1, group=2, strides=[1, 2]), IMAGE),
    "dilation": (conv(2, dilations=[1, 3], pads=[1, 2, 1, 2]), IMAGE),
    "sides": (conv(2, pads=[0, 1, 2, 0]), IMAGE),
    "same upper": (conv(2, auto_pad="SAME_UPPER"), IMAGE),
    "same lower": (conv(2, auto_pad="SAME_LOWER", strides=[2, 2]), IMAGE),
    "valid": (conv(2, auto_pad="VALID"), IMAGE),
    **onnx_moves.NETWORKS,
}  # fmt: skip


@walk("name", NETWORKS)
def test_numbers_are_onnxruntimes(read, name):
    build, shape = NETWORKS[name]
    for seed in range(2):
        graph = Graph(shape)
        agrees(read(graph.model(build(graph))), seed)


def test_shape_is_that_of_one_input(read):
    for shape, expected in {
        (1, 5): (5,),
        (5,): (5,),
        (1,): (1,),
        ("n", 5): (5,),
        (3, 5): (3, 5),
        (1, 1, 5): (1, 5),
    }.items():
        graph = Graph(shape)
        network = read(graph.model(graph("Relu", "x")))
        assert network.shape == torch.Size(expected) and network.outputs == torch.Size(expected).numel()


def test_layers_are_fused_and_shapes_cost_nothing(read):
    def kinds(build, shape):
        graph = Graph(shape)
        network = read(graph.model(build(graph)))
        operations = agrees(network)
        return [" ".join(type(operations[number]).__name__ for number in step) for step in network.module.network.steps]

    assert kinds(old_torch, IMAGE) == ["Convolution Relu", "Rearrangement", "Dense"]
    assert kinds(norms, IMAGE) == [
        "Convolution BatchNorm Relu", "Rearrangement", "BatchNorm", "Dense BatchNorm Relu", "Dense",
    ]  # fmt: skip
    assert kinds(without_batch, [5])[0] == "Dense Relu"  # MatMul, Add and Relu
    assert kinds(keras, ["batch", 6, 6, 3])[0] == "Scale"  # Sub and Div
    assert kinds(keras, ["batch", 6, 6, 3])[-1] == "Dense"
    assert kinds(NETWORKS["same upper"][0], IMAGE)[0] == "Rearrangement"  # the padding, which has two sides
    assert kinds(NETWORKS["dilation"][0], IMAGE) == ["Convolution", "Rearrangement"]
    assert kinds(old_gelu, ROW) == ["Dense", "Gelu", "Scale", "Scale", "Dense"]  # twice gelu, and half of it
    assert kinds(gelu(), ROW) == ["Gelu"] and kinds(gelu_by_tanh(), ROW) == ["GeluTanh"]
    assert kinds(channels, IMAGE) == [
        "Convolution Relu", "Concat", "Convolution", "Scale", "Concat", "Rearrangement",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch.export's and the old exporter's own
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU()], ids=str)
def test_what_torch_exports_reads_as_the_model(tmp_path, dynamo, activation):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), activation, nn.MaxPool2d(2), nn.Flatten(2),
                          nn.Conv1d(4, 4, 3, padding=1), nn.AvgPool1d(2), nn.Flatten(),
                          nn.Linear(8, 8), nn.LeakyReLU(), nn.Dropout(), nn.Linear(8, 3))  # fmt: skip
    randomise_norms(model).eval()
    torch.onnx.export(model, (torch.rand(1, 1, 8, 8),), tmp_path / "a.onnx", dynamo=dynamo, verbose=False)
    network, x = read_onnx(tmp_path / "a.onnx"), torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(network.module(x), model(x), rtol=0, atol=1e-5)
    agrees(network)


def test_gzipped_old_and_external_files(tmp_path):
    graph = Graph(ROW)
    model = graph.model(dense(graph, "x", 5, 3), opset=8, ir=3, listed=True)
    (tmp_path / "a.onnx.gz").write_bytes(gzip.compress(model.SerializeToString()))
    (tmp_path / "folder").mkdir()
    beside = tmp_path / "folder" / "a.onnx"
    onnx.save(model, str(beside), save_as_external_data=True, location="weights", size_threshold=0)
    assert (tmp_path / "folder" / "weights").stat().st_size >= 4 * 18
    networks = [read_onnx(tmp_path / "a.onnx.gz"), read_onnx(beside)]
    for network in networks:
        agrees(network)
    x = torch.rand(2, 5)
    assert torch.equal(networks[0].module(x), networks[1].module(x))

    for location in ("../weights", str(tmp_path / "weights")):
        (tmp_path / "weights").write_bytes((tmp_path / "folder" / "weights").read_bytes())
        moved = onnx.load(beside, load_external_data=False)
        for weight in moved.graph.initializer:
            weight.external_data[0].value = location
        (tmp_path / "folder" / "b.onnx").write_bytes(moved.SerializeToString())
        with pytest.raises(InputError, match=r"b\.onnx: found .*weights.*accepted: .*of its folder"):
            read_onnx(tmp_path / "folder" / "b.onnx")


def test_what_the_output_does_not_need_is_not_looked_at(read):
    graph = Graph(ROW)
    graph("Strange", "x", domain="elsewhere")
    graph.nodes[-1].output.append("")  # left out, as is the bias of the layer that follows
    y = graph("Gemm", "x", weights(5, 3), "")
    graph("Exp", y)
    only_its_shape = graph("Shape", graph("Exp", "x"))
    network = read(graph.model(graph("Reshape", graph("Relu", y), graph("Mul", only_its_shape, integers(0, 0)))))
    assert [type(operation) for operation in agrees(network)] == [Input, Dense, Relu]


def test_weights_that_are_not_finite_are_refused_by_fold(read):
    graph = Graph(ROW)
    network = read(graph.model(graph("Div", "x", np.zeros(5, np.float32))))
    with pytest.raises(UnsupportedOperation, match="v0_0: found a weight that is not finite"):
        fold(network.module, network.shape)


def test_module_moves_whole(read):
    """Constants as well: a network in float64 gives float64."""
    graph = Graph(["batch", 6, 6, 3])
    network = read(graph.model(keras(graph)))
    x = torch.rand(2, *network.shape)
    wide = network.module(x)
    assert network.module.double()(x.double()).dtype == torch.float64
    torch.testing.assert_close(network.module(x.double()).float(), wide, rtol=0, atol=1e-5)


def one(op_type, *inputs, shape=ROW, outputs=1, kind=TensorProto.FLOAT, opset=13, **attributes):
    def build():
        graph = Graph(shape, kind)
        results = graph(op_type, "x", *inputs, outputs=outputs, name="here", **attributes)
        return graph.model(results if outputs == 1 else results[0], opset=opset)

    return build


def backwards():
    graph = Graph(ROW)
    model = graph.model(graph("Relu", graph("Tanh", "x")))
    model.graph.node.append(model.graph.node.pop(0))
    return model


def random_constant():
    graph = Graph(ROW)
    return graph.model(graph("Add", "x", graph("RandomNormal", shape=[1, 5], name="here")))


def second_output():
    graph = Graph(IMAGE)
    _, places = graph("MaxPool", "x", outputs=2, name="here", kernel_shape=[2, 2])
    return graph.model(graph("Cast", places, to=TensorProto.FLOAT))


def constant_first(op_type, constant, **attributes):
    def build():
        graph = Graph(ROW)
        return graph.model(graph(op_type, constant, "x", name="here", **attributes))

    return build


def built(build, shape):
    def model():
        graph = Graph(shape)
        return graph.model(build(graph))

    return model


def constant_output():
    graph = Graph(ROW)
    return graph.model(graph("Cast", graph("Shape", "x"), to=TensorProto.FLOAT))


FIVE = np.ones(5, np.float32)
REFUSED = {
    "unknown operator": (one("Sinh"), ["Sinh 'here'", "bound rule", "Gemm", "MaxPool"]),
    "powers": (one("Pow", FIVE * np.arange(5, dtype=np.float32)), ["Pow 'here'", "exponents [0.0, 1.0", "one finite"]),
    "computed exponent": (constant_first("Pow", np.float32(2)), ["Pow 'here'", "a computed exponent"]),
    "infinite exponent": (one("Pow", np.float32("inf")), ["Pow 'here'", "exponents [inf]", "one finite"]),
    "negative alpha": (one("Elu", alpha=-1.0), ["Elu 'here'", "alpha=-1.0", "a number > 0"]),
    "selu": (one("Selu", gamma=0.0), ["Selu 'here'", "gamma=0.0", "numbers > 0"]),
    "far clip": (one("Clip", np.float32(-1e20)), ["Clip 'here'", "an end of -1e+20", "size 1024 at most, or none"]),
    "clip by nan": (one("Clip", np.float32("nan")), ["Clip 'here'", "an end of nan", "size 1024 at most, or none"]),
    "infinite slope": (one("PRelu", np.float32(["inf"])), ["PRelu 'here'", "slopes that are not finite"]),
    "another domain": (one("Relu", domain="elsewhere"), ["Relu 'here'", "'elsewhere'"]),
    "dynamic size": (one("Relu", shape=[1, "width"]), ["input 'x'", "(1, width)", "batch dimension"]),
    "dynamic size alone": (one("Relu", shape=["width"]), ["input 'x'", "(width)"]),
    "no dimension": (one("Relu", shape=[]), ["input 'x'", "()"]),
    "float16": (one("Relu", kind=TensorProto.FLOAT16), ["input 'x'", "FLOAT16", "float32"]),
    "constant output": (constant_output, ["'v1_0'", "constant"]),
    "order of operators": (backwards, ["topologically sorted", "v0_0"]),
    "sizes that do not fit": (one("MatMul", weights(4, 3)), ["onnxruntime refuses", "MatMul"]),
    "random constant": (random_constant, ["RandomNormal 'here'", "random"]),
    "slope": (one("LeakyRelu", alpha=1.5), ["LeakyRelu 'here'", "1.5", "[0, 1]"]),
    "training dropout": (one("Dropout", np.float32(0.5), np.array(True)), ["Dropout 'here'", "evaluation mode"]),
    "training norm": (one("BatchNormalization", *[abs(weights(5))] * 4, outputs=3, opset=15, training_mode=1),
                      ["BatchNormalization 'here'", "training_mode"]),
    "second output": (second_output, ["MaxPool 'here'", "second output"]),
    "computed index": (constant_first("Gather", weights(4, 2)), ["Gather", "onnxruntime refuses"]),
    "volume": (one("Conv", weights(2, 2, 1, 1, 1), shape=[1, 2, 3, 3, 3]),
               ["Conv 'here'", "(1, 2, 3, 3, 3)", "height"]),
    "several images": (one("Conv", weights(2, 2, 1, 1), shape=[4, 2, 3, 3]), ["Conv 'here'", "(4, 2, 3, 3)"]),
    "dilated mean": (one("AveragePool", shape=IMAGE, kernel_shape=[2, 2], dilations=[2, 2], opset=19),
                     ["AveragePool 'here'", "(2, 2)"]),
    "no such operator": (one("Strange"), ["Strange"]),
    **{name: (built(build, shape), mentions) for name, (build, shape, mentions) in onnx_moves.REFUSED.items()},
}  # fmt: skip


@walk("name", REFUSED)
def test_refusals_name_what_was_found(read, name):
    build, mentions = REFUSED[name]
    with pytest.raises(InputError) as caught:
        read(build())
    message = str(caught.value)
    assert "network.onnx: " in message and "found" in message and "accepted: " in message and "\n" not in message
    for mention in mentions:
        assert mention in message


@pytest.mark.parametrize("kind", ["Erf", "Pow"])
def test_parts_of_a_gelu_alone_have_bounds_too(read, kind):
    graph = Graph(ROW)
    more = [np.float32(3)] if kind == "Pow" else []
    agrees(read(graph.model(graph(kind, "x", *more, name="here"))))


def other_gate(kind, factor, shift):
    """x * σ(factor x + shift), which is no SiLU."""

    def build(graph):
        inner = graph("Add", graph("Mul", "x", np.float32(factor)), np.float32(shift))
        return graph("Mul", "x", graph(kind, inner), name="here")

    return build


def gate_of_another(graph):
    return graph("Mul", "x", graph("Sigmoid", graph("MatMul", "x", weights(5, 5))), name="here")


OTHER_GATES = {
    "another gate": other_gate("Sigmoid", 2.0, 0.0),
    "shifted gate": other_gate("Sigmoid", 1.0, 0.1),
    "gate of another value": gate_of_another,
    "erf without sqrt(2)": gelu(divisor=1.0),
    "half of a gelu's 1": gelu(one=0.5),
    "another cube": gelu_by_tanh(cube=0.05),
}


@walk("name", OTHER_GATES)
def test_other_gates_are_products(read, name):
    graph = Graph(ROW)
    network = read(graph.model(OTHER_GATES[name](graph)))
    kinds = {type(operation) for operation in network.module.operations}
    assert Product in kinds and not kinds & {Silu, Gelu, GeluTanh}
    agrees(network)


@pytest.mark.parametrize("content", [None, b"", b"text", "half", "half of a gzipped one"])
def test_files_that_are_no_models_are_refused(tmp_path, content):
    graph = Graph(ROW)
    whole = graph.model(dense(graph, "x", 5, 3)).SerializeToString()
    path = tmp_path / "a.onnx"
    if content is not None:
        halves = {"half": whole[: len(whole) // 2], "half of a gzipped one": gzip.compress(whole)[:-20]}
        path.write_bytes(halves[content] if isinstance(content, str) else content)
    with pytest.raises(InputError, match=r"a\.onnx: found .*accepted: an ONNX model") as caught:
        read_onnx(path)
    assert "\n" not in str(caught.value)


def test_every_rule_is_tested():
    from test_onnx_more import NETWORKS as MORE  # these import this module
    from test_onnx_norms import NETWORKS as NORMS
    from test_onnx_products import NETWORKS as PRODUCTS

    used = set()
    for build, shape in (*NETWORKS.values(), *MORE.values(), *PRODUCTS.values(), *NORMS.values()):
        graph = Graph(shape)
        build(graph)
        used |= {node.op_type for node in graph.nodes}
    used |= {row.op for row in ROWS.values() if row.op is not None}
    assert not RULES.keys() - used


@walk("name", onnx_moves.NETWORKS)
def test_moved_entries_are_exact(read, name):
    """With default and with disabled optimisation, at random points, at corners and at the largest float32."""
    build, shape = NETWORKS[name]
    graph = Graph(shape)
    network = read(graph.model(build(graph)))
    replay, kinds = replay_session(network.model), {type(one) for one in network.module.network.operations}
    computes = bool(kinds & {Resampling, TransposedConvolution, Dense}) or "double" in name
    points = [torch.rand(network.shape), torch.zeros(network.shape), -torch.ones(network.shape)]
    points.append(torch.full(network.shape, 1e5 if computes else 3e38))
    for x in points:
        # onnxruntime 1.31's optimiser rounds what int8 weights are multiplied with, by 1e-3
        for theirs in replay(x)[: 1 if name == "folded weights" else 2]:
            size = 1e-6 * theirs.abs().max().item() if computes else 0
            torch.testing.assert_close(network.module(x[None])[0], theirs, rtol=0, atol=size)


def test_a_network_of_float64(read):
    graph = Graph(ROW, TensorProto.DOUBLE)
    x = graph("Relu", graph("MatMul", "x", weights(5, 4).astype(np.float64)))
    model = graph.model(graph("Add", x, np.full(4, 0.1)))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    network = read(model)
    x = torch.rand(3, 5)
    theirs = torch.stack([replay_session(network.model)(one)[0] for one in x])
    torch.testing.assert_close(network.module(x).double(), theirs.double(), rtol=0, atol=1e-6)
    assert compute_bounds(network.module, Interval.box(x, 0.1)).contains(theirs.float(), 1e-5).all()


@st.composite
def sequences(draw):
    """A graph of a few operators, each of which fits what is there."""
    shape = draw(st.sampled_from([(1, 2, 5, 4), (1, 4), (6,), (3, 4), (1, 1, 6), (2, 3, 2)]))
    graph, x = Graph(shape), "x"
    for _ in range(draw(st.integers(1, 6))):
        choices = ["activation", "constant", "reshape", "transpose", "matmul", "residual", "slice", "gate"]
        choices += ["join"] * bool(np.prod(shape) <= 100)
        choices += ["left"] * (len(shape) > 1) + ["norm"] * (len(shape) > 1)
        choices += ["conv", "conv", "pool"] * (len(shape) in (3, 4) and shape[0] == 1)
        match draw(st.sampled_from(choices)):
            case "activation":
                x = graph(draw(st.sampled_from(["Relu", "LeakyRelu", "Sigmoid", "Tanh", "Neg"])), x)
            case "constant":
                some = [draw(st.sampled_from([1, size])) for size in shape[draw(st.integers(0, len(shape))) :]]
                pair = [x, np.float32(1.5) + weights(*some)]
                kind = draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
                x = graph(kind, *(pair[::-1] if kind != "Div" and draw(st.booleans()) else pair))
            case "reshape":
                axis = draw(st.integers(0, len(shape)))
                options = [(int(np.prod(shape[:axis])), -1), (*shape[:axis], 1, *shape[axis:]), (-1,), shape[::-1]]
                x = graph("Reshape", x, integers(*draw(st.sampled_from(options))))
            case "transpose":
                x = graph("Transpose", x, perm=draw(st.permutations(range(len(shape)))))
            case "matmul":
                x = graph("MatMul", x, weights(shape[-1], draw(st.integers(1, 3))))
            case "left":
                x = graph("MatMul", weights(draw(st.integers(1, 3)), shape[-2]), x)
            case "gate":
                x = graph("Mul", graph("Sigmoid", x), x) if draw(st.booleans()) else gelu()(graph, x)
            case "join":
                axis = draw(st.integers(0, len(shape) - 1))
                parts = [x, graph("Relu", x), *([weights(*shape)] if draw(st.booleans()) else [])]
                x = graph("Concat", *draw(st.permutations(parts)), axis=axis - len(shape) * draw(st.booleans()))
            case "residual":
                x = graph(draw(st.sampled_from(["Add", "Sub"])), graph("Relu", x), x)
            case "slice":
                axis = draw(st.integers(0, len(shape) - 1))
                start, step = draw(st.sampled_from([(0, 1), (shape[axis] - 1, -1), (shape[axis] // 2, 1), (0, 2)]))
                x = graph(
                    "Slice", x, integers(start), integers(-99 if step < 0 else 99), integers(axis), integers(step)
                )
            case "norm":
                x = norm(graph, x, shape[1])
            case kind:
                places = shape[2:]
                kernel = [draw(st.integers(1, min(size, 3))) for size in places]
                pads = [draw(st.integers(0, (size - 1) // (1 + (kind == "pool")))) for size in kernel * 2]
                options = {"pads": pads, "strides": [draw(st.integers(1, 2)) for _ in places]}
                if kind == "pool":
                    pools = ["MaxPool", "AveragePool"]
                    x = graph(draw(st.sampled_from(pools)), x, kernel_shape=kernel, **options)
                else:
                    groups = draw(st.sampled_from([1, shape[1]]))
                    x = graph("Conv", x, weights(2 * groups, shape[1] // groups, *kernel), group=groups, **options)
        (output,) = graph.model(x).graph.output
        shape = tuple(size.dim_value for size in output.type.tensor_type.shape.dim)
        assert all(shape)
    return graph.model(x)


@settings(max_examples=60, deadline=None)
@given(sequences(), st.integers(0, 99))
def test_any_sequence_of_operators(read, model, seed):
    agrees(read(model), seed)
