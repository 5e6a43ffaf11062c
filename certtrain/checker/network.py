"""ONNX files as lists of operations. A batch has one member; every operator that is not listed is
refused by name."""

import hashlib
import math
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from .arithmetic import Numbers, Rejected
from .more_operators import MoreOperators
from .operations import (
    CheckedOperation,
    ConvolutionMap,
    InputVector,
    Kink,
    MatrixMap,
    ScaleMap,
    SelectionMap,
    SumMap,
)

MOST = 1 << 27
"""Most numbers of one value: what a file of a few bytes may ask for."""


class CheckedNetwork:
    """Operations in order, the input first.

    Attributes:
        operations: each reads operations before it. relus: positions of the non-linear ones.
        sha256: of the file.
    """

    def __init__(self, operations: list[CheckedOperation], sha256: str):
        self.operations, self.sha256 = operations, sha256
        self.relus: list[int] = [i for i, one in enumerate(operations) if isinstance(one, Kink)]
        sizes = [operations[i].size for i in self.relus]
        self.first = dict(zip(self.relus, np.cumsum([0, *sizes]).tolist()))  # numbers of neurons
        self.neurons = sum(sizes)

    @property
    def inputs(self) -> int:
        return self.operations[0].size

    @property
    def outputs(self) -> int:
        return self.operations[-1].size

    def relu_of(self, neuron):
        """(position, entry) of a neuron, counted through all ReLUs."""
        for place in self.relus:
            if self.first[place] <= neuron < self.first[place] + self.operations[place].size:
                return place, neuron - self.first[place]
        raise Rejected(f"neuron {neuron} of {self.neurons}")


def read_network(path: Path, arithmetic: Numbers) -> CheckedNetwork:
    """The network of an ONNX file.

    Raises:
        Rejected: an operator, attribute or shape that is not known here; a damaged file.
    """
    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
        return OnnxReader(model, arithmetic).run(hashlib.sha256(content).hexdigest())
    except Rejected:
        raise
    except Exception as error:  # protobuf and numpy raise many types for damaged files
        raise Rejected(f"{path.name}: cannot be read ({type(error).__name__}: {error})") from error


class _Value:
    """An operation's output with its shape, or a constant array."""

    def __init__(self, shape, position=None, constant=None):
        self.shape, self.position, self.constant = tuple(shape), position, constant
        if math.prod(self.shape) > MOST:
            raise Rejected(f"a value of shape {self.shape}: too large")


class OnnxReader(MoreOperators):
    def __init__(self, model, arithmetic):
        self.graph, self.arithmetic = model.graph, arithmetic
        self.opset = max(i.version for i in model.opset_import if i.domain in ("", "ai.onnx"))
        self.operations, self.values = [], {}

    def run(self, sha256):
        for tensor in self.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise Rejected(f"{tensor.name}: weights outside the file")
            if math.prod(tensor.dims) > MOST:
                raise Rejected(f"{tensor.name}: shape {list(tensor.dims)}: too large")
            self.constant(tensor.name, numpy_helper.to_array(tensor))
        inputs = [one for one in self.graph.input if one.name not in self.values]
        if len(inputs) != 1 or len(self.graph.output) != 1:
            raise Rejected(f"{len(inputs)} inputs, {len(self.graph.output)} outputs; not one each")
        dims = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
        dims[:1] = [size or 1 for size in dims[:1]]
        if min(dims, default=1) < 1 or math.prod(dims) > MOST:
            raise Rejected(f"the input: shape {dims}")
        self.append(inputs[0].name, dims, InputVector(math.prod(dims)))
        for node in self.graph.node:
            rule = getattr(self, f"on_{node.op_type}", None)
            if rule is None or node.domain not in ("", "ai.onnx"):
                raise Rejected(f"operator {node.domain}{node.op_type} is not known here")
            found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            given = [self.values[name] if name else None for name in node.input]
            self.node, self.attributes = node, found
            rule(*given)
            if found:
                raise Rejected(f"{node.op_type}: attributes {sorted(found)} are not known here")
        output = self.values[self.graph.output[0].name]
        if output.position is None:
            raise Rejected("the output is a constant")
        if output.position != len(self.operations) - 1:
            self.values["last"] = output
            self.node = None
            self.select([output], lambda x: x, "last")
        return CheckedNetwork(self.operations, sha256)

    def constant(self, name, value):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise Rejected(f"{name}: found weights that are not finite")
        self.values[name] = _Value(value.shape, constant=value)

    def append(self, name, shape, operation, reads=()):
        """Add an operation that reads values; name its output."""
        operation.name, operation.inputs = name, tuple(value.position for value in reads)
        value = _Value(shape, len(self.operations))
        if operation.size != math.prod(value.shape):
            raise Rejected(f"{name}: {operation.size} numbers for shape {value.shape}")
        self.operations.append(operation)
        self.values[name] = value
        return value

    def attribute(self, name, default):
        return self.attributes.pop(name, default)

    def numbers(self, value, what):
        """The integers of a constant input."""
        if value is None or value.constant is None or value.constant.dtype.kind not in "iu":
            raise Rejected(f"{self.node.op_type}: {what} that are no constant integers")
        return [int(number) for number in value.constant.reshape(-1)]

    def weights(self, value, what="weights"):
        if value is None or value.constant is None or value.constant.dtype.kind != "f":
            raise Rejected(f"{self.node.op_type}: {what} that are no constant floats")
        if value.constant.dtype == np.float64 and self.arithmetic.single:
            raise Rejected("float64 weights have no float32 evaluation")
        return self.arithmetic.numbers(value.constant)

    def select(self, values, function, name=None):
        """Apply a function that only moves numbers to constants, or to the numbers' places."""
        name = name or self.node.output[0]
        if all(value.constant is not None for value in values):
            self.constant(name, np.asarray(function(*(value.constant for value in values))))
            return
        if any(value.constant is not None for value in values):
            raise Rejected(f"{name}: constants among numbers of the network")
        sizes = [math.prod(value.shape) for value in values]
        starts = np.cumsum([1, *sizes]).tolist()  # 0 is what is padded
        places = [
            np.arange(start, start + size).reshape(value.shape)
            for start, size, value in zip(starts, sizes, values)
        ]
        moved = np.asarray(function(*places))
        self.append(name, moved.shape, SelectionMap(moved.reshape(-1) - 1, sizes), values)

    # what only moves numbers

    def on_Constant(self):
        self.constant(self.node.output[0], numpy_helper.to_array(self.attribute("value", None)))

    def on_Identity(self, x, *rest):
        self.select([x], lambda a: a)

    def on_Flatten(self, x):
        axis = self.attribute("axis", 1) % (len(x.shape) + 1)
        self.select([x], lambda a: a.reshape(math.prod(a.shape[:axis]), -1))

    def on_Reshape(self, x, shape):
        wanted = self.numbers(shape, "a shape")
        if self.attribute("allowzero", 0) and 0 in wanted:
            raise Rejected("Reshape: allowzero")
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
        self.select([x], lambda a: a.reshape(wanted))

    def on_Transpose(self, x):
        order = self.attribute("perm", list(range(len(x.shape)))[::-1])
        self.select([x], lambda a: a.transpose(order))

    def on_Concat(self, *values):
        axis = self.attribute("axis", 0)
        self.select(list(values), lambda *parts: np.concatenate(parts, axis))

    # linear operations

    def linear(self, x, shape, operation):
        self.append(self.node.output[0], shape, operation, [x])

    def on_Gemm(self, x, weight, bias=None):
        alpha, beta = self.attribute("alpha", 1.0), self.attribute("beta", 1.0)
        w = self.weights(weight)
        w = w if self.attribute("transB", 0) else w.T
        if self.attribute("transA", 0) or len(x.shape) != 2 or alpha != 1 or beta != 1:
            raise Rejected("Gemm: transA, or factors alpha and beta")
        b = None
        if bias is not None:
            b = np.broadcast_to(self.weights(bias), (x.shape[0], len(w))).reshape(-1)
        self.linear(x, (x.shape[0], len(w)), MatrixMap(w, b, x.shape[0]))

    def on_MatMul(self, x, weight):
        w = self.weights(weight)
        if w.ndim != 2 or not x.shape or x.shape[-1] != len(w):
            raise Rejected(f"MatMul: shapes {x.shape} and {w.shape}")
        self.linear(x, (*x.shape[:-1], w.shape[1]), MatrixMap(w.T, None, math.prod(x.shape[:-1])))

    def on_Conv(self, x, weight, bias=None):
        w, b = self.weights(weight), None if bias is None else self.weights(bias)
        if len(x.shape) != 4 or w.ndim != 4 or x.shape[0] != 1:
            raise Rejected(f"Conv: shapes {x.shape} and {w.shape}; two dimensions, one image")
        kernel, strides, pads, dilations = self._window(x, w.shape[2:])
        groups = self.attribute("group", 1)
        if list(w.shape[2:]) != kernel or w.shape[1] * groups != x.shape[1] or len(w) % groups:
            raise Rejected(f"Conv: weights {w.shape}, {groups} groups, image {x.shape}")
        operation = ConvolutionMap(w, b, x.shape[1:], strides, pads, dilations, groups)
        self.linear(x, (1, len(w), *operation.out), operation)

    def _window(self, x, kernel=None):
        """(kernel, strides, pads, dilations) of two dimensions."""
        kernel = list(self.attribute("kernel_shape", kernel))
        strides = self.attribute("strides", [1, 1])
        dilations = self.attribute("dilations", [1, 1])
        pads = self.attribute("pads", [0, 0, 0, 0])
        auto = self.attribute("auto_pad", b"NOTSET")
        if auto not in (b"NOTSET", b"VALID") or self.attribute("ceil_mode", 0):
            raise Rejected(f"{self.node.op_type}: auto_pad or ceil_mode")
        sizes = len(kernel), len(strides), len(pads), len(dilations)
        if sizes != (2, 2, 4, 2) or min(*kernel, *strides, *dilations) < 1 or min(pads) < 0:
            raise Rejected(f"{self.node.op_type}: a window that is none")
        for i in range(2):
            if x.shape[2 + i] + pads[i] + pads[2 + i] <= dilations[i] * (kernel[i] - 1):
                raise Rejected(f"{self.node.op_type}: an image smaller than the window")
        return kernel, strides, pads, dilations

    def on_AveragePool(self, x):
        if len(x.shape) != 4 or x.shape[0] != 1:
            raise Rejected(f"AveragePool: shape {x.shape}; two dimensions, one image")
        kernel, strides, pads, dilations = self._window(x)
        number = self.arithmetic.numbers
        ones = number(np.ones((x.shape[1], 1, *kernel)))
        window = ConvolutionMap(ones, None, x.shape[1:], strides, pads, dilations, x.shape[1])
        count = kernel[0] * kernel[1]
        shape = (1, x.shape[1], *window.out)
        if self.attribute("count_include_pad", 0):
            share = number(np.ones(window.size)) / count
        else:
            share = 1 / np.maximum(window.product(number(np.ones(math.prod(x.shape)))), 1)
        total = self.append(f"{self.node.output[0]} sum", shape, window, [x])
        self.linear(total, shape, ScaleMap(share, None, inexact=1))

    def scaled(self, x, factor, bias, inexact=0):
        """factor x + bias, each of any shape that broadcasts to that of x."""
        number = self.arithmetic.numbers
        factor, bias = (
            np.broadcast_to(number(part), x.shape).reshape(-1) for part in (factor, bias)
        )
        self.linear(x, x.shape, ScaleMap(factor, bias if np.any(bias) else None, inexact))

    def _pair(self, first, second, sign):
        """first + sign second, one of them perhaps a constant."""
        if first.constant is not None and second.constant is not None:
            raise Rejected(f"{self.node.op_type}: arithmetic of constants")
        if first.constant is not None:
            self.same_shape(second, first)
            self.scaled(second, sign, self.weights(first))
        elif second.constant is not None:
            self.same_shape(first, second)
            self.scaled(first, 1, sign * self.weights(second))
        elif first.shape == second.shape:
            self.append(
                self.node.output[0],
                first.shape,
                SumMap(math.prod(first.shape), sign),
                [first, second],
            )
        else:
            raise Rejected(f"{self.node.op_type}: shapes {first.shape} and {second.shape}")

    def same_shape(self, x, constant):
        if np.broadcast_shapes(x.shape, constant.shape) != x.shape:
            raise Rejected(f"{self.node.op_type}: shapes {x.shape} and {constant.shape}")

    def on_Add(self, first, second):
        self._pair(first, second, 1)

    def on_Sub(self, first, second):
        self._pair(first, second, -1)

    # what is not linear

    def on_Relu(self, x):
        self.linear(x, x.shape, Kink(math.prod(x.shape), 0))

    def on_LeakyRelu(self, x):
        slope = self.arithmetic.numbers(np.float64(np.float32(self.attribute("alpha", 0.01))))[()]
        if not 0 <= slope <= 1:
            raise Rejected(f"LeakyRelu: slope {float(slope)}; from 0 to 1")
        self.linear(x, x.shape, Kink(math.prod(x.shape), slope))
