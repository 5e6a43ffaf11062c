"""Graphs of operators that move, select, repeat, pad or resize, for ``test_onnx_network.py``."""

import numpy as np
from onnx import TensorProto

RANDOM = np.random.default_rng(1)


def weights(*shape: int) -> np.ndarray:
    return (RANDOM.normal(size=shape) / max(1, np.prod(shape[1:])) ** 0.5).astype(np.float32)


def integers(*values) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def one(op_type: str, *inputs, opset=13, **attributes):
    """The operator on x, then a ReLU of what is left of 0.5."""

    def build(graph):
        graph.opset = opset
        x = graph(op_type, "x", *inputs, **attributes)
        return graph("Relu", graph("Sub", x, np.float32(0.5)))

    return build


def resize(*, opset=13, scales=None, sizes=None, **attributes):
    empty = np.zeros(0, np.float32)
    if opset < 11:
        return one("Resize", np.array(scales, np.float32), opset=opset, **attributes)
    if sizes is not None:
        return one("Resize", "", "" if opset > 12 else empty, integers(*sizes), opset=opset, **attributes)
    return one("Resize", "" if opset > 12 else empty, np.array(scales, np.float32), opset=opset, **attributes)


def upsample(opset, scales, **attributes):
    if opset < 9:
        return one("Upsample", opset=opset, scales=scales, **attributes)
    return one("Upsample", np.array(scales, np.float32), opset=opset, **attributes)


def transposed(channels=3, kernel=(3, 2), groups=1, bias=True, **attributes):
    def build(graph):
        vector = [weights(channels * groups)] if bias else []
        x = graph("ConvTranspose", "x", weights(2, channels, *kernel), *vector, group=groups, **attributes)
        return graph("Flatten", x)

    return build


def scattered(graph):
    """Into a constant, then constants into a computed value, then one computed value into another."""
    graph.opset = 18
    x = graph("ScatterND", weights(4, 5), integers([1], [-1]), graph("Concat", "x", graph("Neg", "x"), axis=0))
    x = graph("ScatterND", x, integers([0, 2], [3, -1]), weights(2))
    return graph("ScatterElements", x, integers([0, 1, 3, 2, 0]), graph("Relu", "x"), axis=0)


def chosen(graph):
    """Between a computed value and a constant, which broadcasts, and between two computed values."""
    mask = np.array([[True, False, True, True, False]])
    x = graph("Where", mask, "x", np.float32(0.25))
    x = graph("Where", np.array([[True], [False]]), x, graph("Neg", graph("Relu", "x")))
    return graph("Where", mask[:, ::-1], weights(1, 5), x)


def folded_weights(graph):
    """Quantised weights, which are constants, and a shape that is computed."""
    graph.opset = 13
    matrix = RANDOM.integers(-99, 99, (5, 4)).astype(np.int8)
    matrix = graph("DequantizeLinear", matrix, np.float32(0.02), np.int8(3))
    x = graph("MatMul", "x", matrix)
    bias = graph("QuantizeLinear", weights(4), np.float32(0.1), np.uint8(128))
    x = graph("Add", x, graph("DequantizeLinear", bias, np.float32(0.1), np.uint8(128)))
    shape = graph("Concat", graph("Shape", x), integers(1), axis=0)
    shape = graph("Mul", shape, graph("Expand", integers(1), graph("Shape", shape)))
    size = graph("Size", x)
    steps = graph("Cast", graph("Range", np.int64(0), size, np.int64(1)), to=TensorProto.FLOAT)
    return graph("Mul", graph("Squeeze", graph("Reshape", x, shape), integers(2)), steps)


def double_precision(graph):
    x = graph("Cast", "x", to=TensorProto.DOUBLE)
    x = graph("MatMul", x, weights(5, 4).astype(np.float64))
    x = graph("Pad", graph("Add", graph("Relu", x), np.full(4, 0.1)), integers(0, 1, 0, 0), np.float64(0.3))
    return graph("Cast", graph("Concat", x, np.full((1, 1), 0.7), axis=1), to=TensorProto.FLOAT)


def several(graph):
    """Concatenation of computed values and constants, and Split by num_outputs."""
    graph.opset = 18
    first, second, third = graph("Split", "x", outputs=3, axis=1, num_outputs=3)
    x = graph("Concat", third, weights(1, 2), first, graph("Relu", second), np.zeros((1, 1), np.float32), axis=1)
    return graph("Concat", x, graph("Neg", x), axis=0)


IMAGE, ROW = [1, 2, 4, 6], [1, 5]
HALVES = {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}
NETWORKS = {
    "Expand": (one("Expand", integers(3, 2, 5)), [1, 1, 5]),
    "Expand of many": (one("Expand", integers(40, 5)), ROW),
    "Tile": (one("Tile", integers(2, 3)), ROW),
    "Gather, repeatedly": (one("Gather", integers(*[1] * 6), axis=1), ROW),
    "GatherND": (one("GatherND", integers([[0, 1], [0, -1]])), [1, 2, 4]),
    "GatherND, batch": (one("GatherND", integers([[1, 2]]), batch_dims=1), [1, 2, 4]),
    "GatherElements": (one("GatherElements", integers([3, 0, 3, -1, 1]), axis=0), [4, 5]),
    "ScatterND": (scattered, ROW),
    "Where": (chosen, ROW),
    "Trilu": (one("Trilu", np.array(1), upper=0, opset=14), [1, 3, 4, 5]),
    "folded weights": (folded_weights, ROW),
    "double precision": (double_precision, ROW),
    "several": (several, [1, 6]),
    "pad with a number": (one("Pad", integers(0, 1, 0, 2), np.float32(-0.3)), ROW),
    "pad of opset 2": (one("Pad", opset=10, pads=[0, 1, 0, -2], value=0.7), ROW),
    "pad by reflection": (one("Pad", integers(0, 0, 2, 1, 0, 0, 1, 3), mode="reflect"), IMAGE),
    "pad with the edge": (one("Pad", integers(0, 0, 0, 1, 0, 0, 1, 3), mode="edge"), IMAGE),
    "pad of axes": (one("Pad", integers(2, 1), np.float32(0.1), integers(-1), opset=18), IMAGE),
    "pad around": (one("Pad", integers(2, 1, 1, 0), "", integers(2, 3), mode="wrap", opset=19), IMAGE),
    "squeeze of attributes": (one("Squeeze", opset=11, axes=[0]), ROW),
    "resize": (resize(scales=[1, 1, 2, 2]), IMAGE),
    "resize of opset 10": (resize(opset=10, scales=[1, 1, 2, 1.5]), IMAGE),
    "resize of opset 10, linear": (resize(opset=10, scales=[1, 1, 2, 1.5], mode="linear"), IMAGE),
    "resize of opset 11": (resize(opset=11, scales=[1, 1, 0.5, 1.5], nearest_mode="ceil"), IMAGE),
    "resize, TensorFlow": (
        resize(opset=11, scales=[1, 1, 2, 3], coordinate_transformation_mode="tf_half_pixel_for_nn"), IMAGE),
    "resize, floor": (
        resize(sizes=[1, 2, 7, 3], nearest_mode="floor", coordinate_transformation_mode="asymmetric"), IMAGE),
    "resize, prefer ceil": (resize(sizes=[1, 2, 8, 3], nearest_mode="round_prefer_ceil"), IMAGE),
    "resize, corners": (
        resize(sizes=[1, 2, 7, 11], mode="linear", coordinate_transformation_mode="align_corners"), IMAGE),
    "resize, corners, nearest": (
        resize(sizes=[1, 2, 7, 11], coordinate_transformation_mode="align_corners"), IMAGE),
    "resize, linear": (resize(scales=[1, 1, 2, 1.5], mode="linear"), IMAGE),
    "resize, linear, smaller": (resize(sizes=[1, 2, 3, 4], mode="linear"), IMAGE),
    "resize, asymmetric": (resize(scales=[1, 1, 1.7, 2], **HALVES), IMAGE),
    "resize, PyTorch": (
        resize(sizes=[1, 2, 1, 5], mode="linear", coordinate_transformation_mode="pytorch_half_pixel"), IMAGE),
    "resize, symmetric": (
        resize(scales=[1, 1, 1.6, 1.3], mode="linear", coordinate_transformation_mode="half_pixel_symmetric",
               opset=19), IMAGE),
    "resize of axes": (resize(scales=[2, 3], axes=[2, 3], opset=18), IMAGE),
    "resize of lines": (resize(scales=[1, 1, 2], mode="linear"), [1, 2, 7]),
    "upsample of opset 7": (upsample(7, [1.0, 1.0, 2.0, 3.0]), IMAGE),
    "upsample": (upsample(9, [1, 1, 2, 2], mode="linear"), IMAGE),
    "transposed convolution": (transposed(strides=[2, 3], pads=[1, 0, 0, 1], output_padding=[1, 2]), IMAGE),
    "transposed convolution of groups": (transposed(2, groups=2, bias=False, dilations=[2, 1]), IMAGE),
    "transposed convolution to a shape": (transposed(strides=[2, 2], output_shape=[9, 13]), IMAGE),
    "transposed convolution, same": (transposed(kernel=(3, 4), strides=[2, 2], auto_pad="SAME_UPPER"), IMAGE),
    "transposed convolution, same, lower": (transposed(kernel=(3, 3), strides=[2, 2], auto_pad="SAME_LOWER"), IMAGE),
    "transposed convolution, valid": (transposed(auto_pad="VALID"), IMAGE),
    "transposed convolution of a sequence": (transposed(kernel=(3,), strides=[2]), [1, 2, 7]),
}  # fmt: skip


def condition(graph):
    mask = graph("Cast", "x", to=TensorProto.BOOL, name="here")
    return graph("Where", mask, "x", np.float32(0))


def argmax(graph):
    index = graph("Cast", graph("ArgMax", "x", axis=1, name="here"), to=TensorProto.FLOAT)
    return graph("Add", index, np.float32(1))


def half(graph):
    return graph("Cast", graph("Cast", "x", to=TensorProto.FLOAT16, name="here"), to=TensorProto.FLOAT)


def named(op_type, *inputs, opset=13, **attributes):
    def build(graph):
        graph.opset = opset
        return graph(op_type, "x", *inputs, name="here", **attributes)

    return build


def named_resize(opset=13, sizes=(1, 2, 8, 12), **attributes):
    return named("Resize", "", "", integers(*sizes), opset=opset, **attributes)


INFINITE = np.float32(-np.inf)
REFUSED = {
    "condition": (condition, ROW, ["Cast 'here'", "to=BOOL", "FLOAT, DOUBLE"]),
    "half": (half, ROW, ["Cast 'here'", "FLOAT16"]),
    "ArgMax": (argmax, ROW, ["ArgMax 'here'", "compares its scores"]),
    "infinite padding": (named("Pad", integers(0, 1, 0, 0), INFINITE), ROW, ["Pad 'here'", "not finite"]),
    "negative pads": (named("Pad", integers(0, -1, 0, 1), mode="edge"), ROW, ["Pad 'here'", "mode=edge", ">= 0"]),
    "cubic": (named_resize(mode="cubic"), IMAGE, ["Resize 'here'", "mode=cubic", "nearest, linear"]),
    "crop": (named("Resize", np.zeros(8, np.float32), "", integers(1, 2, 8, 12),
                   coordinate_transformation_mode="tf_crop_and_resize"), IMAGE,
             ["Resize 'here'", "coordinate_transformation_mode=tf_crop_and_resize", "half_pixel"]),
    "one corner": (named_resize(sizes=(1, 2, 1, 3), mode="linear", coordinate_transformation_mode="align_corners"),
                   IMAGE, ["Resize 'here'", "align_corners of one place", "divides by 0"]),
    "antialias": (named_resize(opset=18, mode="linear", antialias=1), IMAGE, ["Resize 'here'", "antialias=1"]),
    "aspect": (named_resize(opset=18, sizes=(1, 2, 8, 9), keep_aspect_ratio_policy="not_larger"), IMAGE,
               ["Resize 'here'", "keep_aspect_ratio_policy", "stretch"]),
    "twice": (named("ScatterND", integers([0, 1], [0, 1]), weights(2), opset=18), ROW,
              ["ScatterND 'here'", "an index that occurs twice", "each index once"]),
    "short kernel": (transposed(kernel=(1, 1), strides=[2, 2], auto_pad="SAME_UPPER"), IMAGE,
                     ["ConvTranspose", "auto_pad=SAME_UPPER, for which onnxruntime gives", "of the standard"]),
    "added": (named("ScatterND", integers([0, 1]), weights(1), opset=18, reduction="add"), ROW,
              ["ScatterND 'here'", "reduction=add", "none"]),
}  # fmt: skip
