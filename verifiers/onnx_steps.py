"""Building blocks for the rules of ONNX operators: values by name, and the operations that rules append to a network.

The ONNX shape of every value is known, for one input. A value of ONNX shape (1, *rest) is held as (B, *rest), any other
as (B, *shape): whatever dimensions a file adds, moves or leaves out, row b belongs to input b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from ..bounds.operations import (
    Affine,
    Concat,
    Convolution,
    Copies,
    Dense,
    Operation,
    Rearrangement,
    Scale,
    Sum,
    UnsupportedOperation,
)  # fmt: skip

Shape = tuple[int, ...]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Value:
    """The result of the operation at ``position``, with its ONNX shape for one input."""

    position: int
    shape: Shape


def held(shape: Shape) -> Shape:
    """The shape of one sample, as operations hold it, for an ONNX shape."""
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape or (1,)


def session(model: onnx.ModelProto, *, optimised: bool = False) -> onnxruntime.InferenceSession:
    """An onnxruntime session on one CPU thread, which evaluates operator by operator or with default optimisations.

    With the optimisations the number of threads changes nothing: convolutions of 1 to 64 channels and Gemms of up to
    8192 numbers gave the same bits on 1, 2, 4 and all threads (onnxruntime 1.31). Operator by operator it changes
    convolutions of 16 channels or more.
    """
    options = onnxruntime.SessionOptions()
    if not optimised:  # onnxruntime 1.31's optimiser gets a Transpose before a MatMul with a vector wrong
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def evaluate(model: onnx.ModelProto, image: np.ndarray, names: list[str]) -> list[np.ndarray]:
    """The values called ``names`` in the file, at one input."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {output.name for output in model.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    listed = {weight.name for weight in model.graph.initializer}
    (name,) = (given.name for given in model.graph.input if given.name not in listed)
    return [np.asarray(value) for value in session(shown).run(names, {name: image})] if names else []


@dataclass
class Construction:
    """A network under construction, and data on the names in the file.

    Args:
        path: the file, for errors. model: its content.
        shapes, kinds: ONNX shapes and element types of the values that depend on the network's input.
        constants: values that do not.
        readers: number of operator inputs and network outputs that read a name.
        operations: the operations so far. values: computed values so far, by name.
    """

    path: str
    model: onnx.ModelProto
    shapes: Mapping[str, Shape]
    kinds: Mapping[str, np.dtype[Any]]
    constants: Mapping[str, np.ndarray]
    readers: Mapping[str, int]
    operations: list[Operation]
    values: dict[str, Value] = field(default_factory=dict[str, Value])

    def reshaped(self, value: Value, shape: Shape, path: str) -> Value:
        """The value in another ONNX shape, with the same entries in the same order."""
        target = held(shape)
        if held(value.shape) == target:
            return Value(value.position, shape)
        self.operations.append(Rearrangement(path, (value.position,), lambda x: x.reshape(x.shape[0], *target)))
        return Value(len(self.operations) - 1, shape)

    def has_one_reader(self, value: Value) -> bool:
        """Whether an operation's result is read at most once, under all of its names."""
        return sum(self.readers[name] for name, known in self.values.items() if known.position == value.position) <= 1


class OnnxStep:
    """One output of an operator in the file, as a rule's argument: its inputs, attributes and shape."""

    def __init__(self, run: Construction, node: onnx.NodeProto, output: str):
        self.run, self.node, self.output = run, node, output
        self.path, self.shape = node.name or output, run.shapes[output]
        self.attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        self.opset = next(known.version for known in run.model.opset_import if known.domain in ("", "ai.onnx"))

    def refuse(self, found: str, accepted: str) -> NoReturn:
        place = f"{self.run.path}: {self.node.op_type} {self.path!r}"
        raise UnsupportedOperation(f"{place}: found {found}; accepted: {accepted}")

    def has(self, number: int) -> bool:
        return number < len(self.node.input) and self.node.input[number] != ""

    def computed(self, number: int) -> bool:
        return self.has(number) and self.node.input[number] in self.run.values

    def value(self, number: int) -> Value:
        if not self.computed(number):
            self.refuse(f"a constant as input {number}", "a value computed from the network's input")
        return self.run.values[self.node.input[number]]

    def constant(self, number: int) -> Tensor:
        if self.computed(number):
            self.refuse(f"input {number} computed from the network's input", "a constant")
        return torch.tensor(self.run.constants[self.node.input[number]])

    def weight(self, number: int) -> Tensor:
        """A constant in float32, which has to hold it exactly."""
        constant = self.constant(number)
        if not torch.equal(constant.float().to(constant.dtype), constant) and not constant.isnan().any():
            self.refuse(f"weights of {constant.dtype} as input {number}", "weights that float32 holds exactly")
        return constant.float()

    def kind(self, number: int) -> np.dtype[Any]:
        """The element type of a computed input in the file."""
        return self.run.kinds[self.node.input[number]]

    def joined(self, values: list[Value], shape: Shape, axis: int) -> Value:
        """Concatenate values of ONNX shapes (1, …) along dimension ``axis`` > 0."""
        self.run.operations.append(Concat(self.path, tuple(value.position for value in values), axis))
        return Value(len(self.run.operations) - 1, shape)

    def append(self, kind: type[Operation], value: Value, shape: Shape, *fields: Any) -> Value:
        self.run.operations.append(kind(self.path, (value.position,), *fields))
        return Value(len(self.run.operations) - 1, shape)

    def add(self, values: list[Value], sign: float = 1.0) -> Value:
        self.run.operations.append(Sum(self.path, tuple(value.position for value in values), sign))
        return Value(len(self.run.operations) - 1, self.shape)

    def reshaped(self, value: Value, shape: Shape | None = None) -> Value:
        return self.run.reshaped(value, self.shape if shape is None else shape, self.path)

    def aligned(self, value: Value) -> Value:
        """The value with as many dimensions as the step's output, and held like it: then operations broadcast it."""
        rank = len(self.shape)
        shape = (*[1] * (rank - len(value.shape)), *value.shape)
        whole = rank > 1 and len(held(self.shape)) == rank  # the first dimension is held
        return Value(self.reshaped(value, (1, *shape) if whole else shape).position, shape)

    def times(self, value: Value, factor: float) -> Value:
        """The value times a number, in its own shape."""
        constants = ScaleConstants(*(torch.tensor(number, dtype=torch.float64) for number in (factor, 0.0)))
        return self.append(Scale, value, value.shape, constants, constants.exact)

    def picked(self, value: Value, index: Tensor) -> Value:
        """Entries of ``value`` by their numbers in ``index``, counted from 1; 0 gives a zero."""
        shape, flat = tuple(index.shape), index.flatten()
        if torch.equal(flat, torch.arange(1, math.prod(value.shape) + 1)):
            return self.reshaped(value, shape)
        target = held(shape)

        def pick(x: Tensor) -> Tensor:
            # gather: its adjoint is a hundred times as fast as that of x[:, index] (one image of 3072 entries: 0.1 ms)
            picked = F.pad(x.flatten(1), (1, 0)).gather(1, flat.to(x.device).expand(x.shape[0], -1))
            return torch.unflatten(picked, 1, target)

        return self.append(Copies, value, shape, pick)

    def transposed(self, value: Value) -> Value:
        """The value with its last two dimensions swapped."""
        return self.picked(value, numbers(value.shape).mT)

    def linear(self, value: Value, weight: Tensor) -> Value:
        """The product of ``weight`` (H, D) with the last dimension of ``value``."""
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = fixed(weight)
        return self.append(Dense, value, (*value.shape[:-1], len(weight)), layer)

    def scaled(self, value: Value, scale: Tensor | float, shift: Tensor | float, *, roundings: int = 2) -> Value:
        """scale * value + shift. A shift along the outputs of a layer without bias becomes its bias if it is exact in
        float32.

        Args:
            roundings: most float32 roundings of one output, relative to |scale value| + |shift|.
        """
        widens = math.prod(self.shape) != math.prod(value.shape)
        value = self.aligned(value) if widens else self.reshaped(value)
        scale, shift = (self.against(torch.as_tensor(constant, dtype=torch.float64)) for constant in (scale, shift))
        before = self.run.operations[value.position]
        alone = (scale == 1).all() and not widens and self.run.has_one_reader(value)
        if isinstance(before, Affine) and before.bias is None and alone:
            features = shift.shape[1 if isinstance(before, Convolution) else -1]
            if shift.numel() == features and torch.equal(shift.float().double(), shift):
                bias = fixed(shift.float().flatten().expand(len(before.weight)))
                assert isinstance(before.layer, nn.Module)
                before.layer.register_parameter("bias", bias)
                return value
        constants = ScaleConstants(scale, shift)
        return self.append(Scale, value, self.shape, constants, constants.exact, roundings)

    def against(self, constant: Tensor) -> Tensor:
        """Reshape a constant that broadcasts against ``self.shape`` to one that does against (1, *held)."""
        full = (*[1] * (len(self.shape) - constant.ndim), *constant.shape)
        return constant.reshape(full if len(held(self.shape)) < len(full) else (1, *full))


class ScaleConstants(nn.Module):
    """Constants of a ``Scale`` operation: float32 buffers, which move with the network, and exact float64 values."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.float())
        self.register_buffer("shift", shift.float())
        self.unrounded = scale, shift

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift

    def exact(self) -> tuple[Tensor, Tensor]:
        return self.unrounded


def fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)


def numbers(shape: Shape) -> Tensor:
    """The numbers of a value's entries, counted from 1, in the value's shape."""
    return torch.arange(1, math.prod(shape) + 1).reshape(shape)
