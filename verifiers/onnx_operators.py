"""ONNX operators → operations of a network: one small rule per operator, the table last."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds.operations import (
    AveragePool,
    BatchNorm,
    Convolution,
    Dense,
    LeakyRelu,
    MaxPool,
    Operation,
    Rearrangement,
    Relu,
    Sigmoid,
    Tanh,
)  # fmt: skip
from . import onnx_gates, onnx_moves, onnx_norms, onnx_products, onnx_scalar
from .onnx_steps import OnnxStep, Pair, Shape, Value, fixed


def _reshape(step: OnnxStep) -> Value:
    for number in range(1, len(step.node.input)):
        if step.has(number):
            step.constant(number)  # a shape or axes: the resulting shape is known from onnxruntime
    return step.reshaped(step.value(0))


def _dropout(step: OnnxStep) -> Value:
    if step.has(2) and step.constant(2).any():
        step.refuse("training_mode", "a network in evaluation mode")
    return _reshape(step)


def _concat(step: OnnxStep) -> Value:
    axis: int = step.attributes["axis"] % len(step.shape)
    count = len(step.node.input)
    if all(step.computed(number) for number in range(count)) and step.shape[0] == 1 and axis > 0:
        return step.joined([step.value(number) for number in range(count)], step.shape, axis)
    return onnx_moves.moved(*range(count))(step)


def _arithmetic(step: OnnxStep) -> Value:
    kind, left, right = step.node.op_type, step.computed(0), step.computed(1)
    if left and right:
        return onnx_products.arithmetic(step)
    value, constant = (step.value(0), step.constant(1)) if left else (step.value(1), step.constant(0))
    match kind:
        case "Add":
            return step.scaled(value, 1.0, constant)
        case "Sub":
            return step.scaled(value, 1.0, -constant) if left else step.scaled(value, -1.0, constant)
        case "Mul":
            return step.scaled(value, constant, 0.0)
        case _:
            if right:
                step.refuse("division by a computed value", "division by a constant")
            return step.scaled(value, 1 / constant.double(), 0.0)


def _matmul(step: OnnxStep) -> Value:
    left = step.computed(0)
    if left and step.computed(1):
        return onnx_products.matrix_product(step)
    value, matrix = (step.value(0), step.weight(1)) if left else (step.value(1), step.weight(0))
    if matrix.ndim == 1:
        matrix = matrix[:, None] if left else matrix[None]
    if matrix.shape[:-2].numel() != 1:
        step.refuse(f"a constant of shape {tuple(matrix.shape)}", "one matrix")
    matrix = matrix.reshape(matrix.shape[-2:])
    if left:
        return step.reshaped(step.linear(value, matrix.T))
    if len(value.shape) == 1:
        return step.reshaped(step.linear(value, matrix))
    return step.reshaped(step.transposed(step.linear(step.transposed(value), matrix)))


def _gemm(step: OnnxStep) -> Value:
    left, attributes = step.computed(0), step.attributes
    value, matrix = (step.value(0), step.weight(1)) if left else (step.value(1), step.weight(0))
    own, other = ("transA", "transB") if left else ("transB", "transA")
    matrix = matrix.T if attributes.get(other) else matrix
    if bool(attributes.get(own)) == left:
        value = step.transposed(value)
    value = step.linear(value, matrix.T) if left else step.transposed(step.linear(value, matrix))
    alpha = attributes.get("alpha", 1.0)
    shift = attributes.get("beta", 1.0) * step.constant(2).double() if step.has(2) else 0.0  # two float32's product
    # roundings of the product with alpha, the product with beta and the sum
    return step.scaled(value, alpha, shift, roundings=3) if step.has(2) or alpha != 1 else value


@dataclass(frozen=True)
class _Windows:
    """Windows over an image padded by ``begin`` and ``end``; all fields are (rows, columns)."""

    image: Pair
    output: Pair
    kernel: Pair
    stride: Pair
    dilation: Pair
    begin: Pair
    end: Pair

    @property
    def missing(self) -> list[int]:
        """[rows, columns] of padding that the output's size requires at the far ends."""
        sizes = zip(self.image, self.output, self.kernel, self.stride, self.dilation, self.begin)
        return [max((o - 1) * s + d * (k - 1) + 1 - b - i, 0) for i, o, k, s, d, b in sizes]

    def padded(self, x: Tensor, value: float) -> Tensor:
        around = (self.begin[1], self.missing[1], self.begin[0], self.missing[0])
        return F.pad(x, around, value=value) if any(around) else x


def _windows(step: OnnxStep, kernel: list[int]) -> tuple[Value, _Windows]:
    """(value, windows): the input of a convolution or a pool as (1, C, H, W), and its windows."""
    value, attributes = step.value(0), step.attributes
    if len(value.shape) not in (3, 4) or value.shape[0] != 1:
        step.refuse(f"an input of shape {value.shape}", "(1, channels, height, width) or (1, channels, length)")

    def pair(sizes: list[int] | Shape, missing: int = 1) -> Pair:
        rows, columns = [missing] * (2 - len(sizes)) + list(sizes)  # one dimension is a row
        return rows, columns

    value = step.reshaped(value, (*value.shape[:2], *pair(value.shape[2:])))
    pads, mode = attributes.get("pads", []), attributes.get("auto_pad", b"NOTSET").decode()
    begin, end = (pair(half, 0) for half in (pads[: len(pads) // 2], pads[len(pads) // 2 :]))
    windows = _Windows(pair(value.shape[2:]), pair(step.shape[2:]), pair(kernel), pair(attributes.get("strides", [])),
                       pair(attributes.get("dilations", [])), begin, end)  # fmt: skip
    if mode.startswith("SAME"):
        total = replace(windows, begin=(0, 0)).missing
        end = tuple((pad + (mode == "SAME_UPPER")) // 2 for pad in total)
        windows = replace(windows, begin=tuple(pad - e for pad, e in zip(total, end)), end=end)
    return value, windows


def _conv(step: OnnxStep) -> Value:
    weight, groups = step.weight(1), step.attributes.get("group", 1)
    value, windows = _windows(step, list(weight.shape[2:]))
    weight = weight.reshape(*weight.shape[:2], *windows.kernel)
    padding = windows.begin
    sizes = zip(windows.image, windows.kernel, windows.stride, windows.dilation, padding)
    if windows.output != tuple((i + 2 * b - d * (k - 1) - 1) // s + 1 for i, k, s, d, b in sizes):
        padded = windows.padded(torch.empty(value.shape, device="meta"), 0.0).shape
        value = step.append(Rearrangement, value, tuple(padded), partial(windows.padded, value=0.0))
        padding = (0, 0)
    geometry = windows.stride, padding, windows.dilation, groups
    layer = nn.Conv2d(weight.shape[1] * groups, len(weight), windows.kernel, *geometry, bias=False, device="meta")
    layer.weight = fixed(weight)
    layer.register_parameter("bias", fixed(step.weight(2)) if step.has(2) else None)
    return step.reshaped(step.append(Convolution, value, (1, len(weight), *windows.output), layer, *geometry))


def _max_pool(step: OnnxStep) -> Value:
    value, windows = _windows(step, step.attributes["kernel_shape"])
    walk = windows.kernel, windows.stride, 0, windows.dilation

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(windows.padded(x, -math.inf), *walk)

    return step.reshaped(step.append(MaxPool, value, (*value.shape[:2], *windows.output), pool))


def _average_pool(step: OnnxStep) -> Value:
    value, windows = _windows(step, step.attributes["kernel_shape"])
    if windows.dilation != (1, 1):
        step.refuse(f"dilations {windows.dilation}", "1")

    def total(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, windows.kernel, windows.stride, divisor_override=1)

    (top, left), (bottom, right), (below, beside) = windows.begin, windows.end, windows.missing
    counted = float(step.attributes.get("count_include_pad", 0))
    ones = F.pad(torch.ones(1, 1, *windows.image), (left, right, top, bottom), value=counted)
    counts = total(F.pad(ones, (0, beside - right, 0, below - bottom)))  # what ceil_mode adds is never counted
    if not counts.all():
        step.refuse("a window over padding alone", "windows that see the image")

    def pool(x: Tensor) -> Tensor:
        return total(windows.padded(x, 0.0)) / counts.to(x)

    return step.reshaped(step.append(AveragePool, value, (*value.shape[:2], *windows.output), pool))


def _reduced(step: OnnxStep) -> Value:
    """A rule for means and sums over some dimensions, which are moved to the end and joined."""
    value = onnx_products.reduced_last(step)
    function = torch.sum if step.node.op_type == "ReduceSum" else torch.mean
    reduced = (*value.shape[:-1], 1)
    return step.reshaped(step.append(AveragePool, value, reduced, partial(function, dim=-1, keepdim=True)))


def _batch_norm(step: OnnxStep) -> Value:
    if step.attributes.get("training_mode") or not step.attributes.get("spatial", 1):
        step.refuse("training_mode, or statistics of every place", "a batch norm in evaluation mode, of channels")
    value, epsilon = step.value(0), step.attributes.get("epsilon", 1e-5)
    weight, bias, mean, variance = (step.weight(number) for number in range(1, 5))
    before = step.run.operations[value.position]
    linear = isinstance(before, Dense)
    rank = len(value.shape)
    if value.shape[0] == 1 and (rank == 2 or (rank == 4 and not linear)):
        norm = (nn.BatchNorm1d if rank == 2 else nn.BatchNorm2d)(len(weight), epsilon)
        norm.weight, norm.bias, norm.running_mean, norm.running_var = fixed(weight), fixed(bias), mean, variance
        return step.append(BatchNorm, value, step.shape, norm)
    # channels that are not the last affine layer's outputs; roundings of a norm that is not folded into a layer
    scale = weight.double() / (variance.double() + epsilon).sqrt()
    mean, scale, bias = (vector.reshape(-1, *[1] * (rank - 2)) for vector in (mean, scale, bias))
    return step.scaled(step.scaled(value, 1.0, -mean, roundings=3), scale, bias, roundings=8)


def _activation(kind: type[Operation]) -> Callable[[OnnxStep], Value]:
    return lambda step: step.append(kind, step.value(0), step.shape)


def _leaky(step: OnnxStep) -> Value:
    slope = step.attributes.get("alpha", 0.01)
    if not 0 <= slope <= 1:
        step.refuse(f"alpha={slope}", "a slope in [0, 1]")
    return step.append(LeakyRelu, step.value(0), step.shape, slope)


RULES: dict[str, Callable[[OnnxStep], Value]] = {
    "Add": _arithmetic,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": onnx_moves.cast,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": onnx_moves.transposed_convolution,
    "DepthToSpace": onnx_moves.moved(0),
    "Div": _arithmetic,
    "Dropout": _dropout,
    "Expand": onnx_moves.moved(0),
    "Flatten": _reshape,
    "Gather": onnx_moves.moved(0),
    "GatherElements": onnx_moves.moved(0),
    "GatherND": onnx_moves.moved(0),
    "Gelu": onnx_gates.gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _reduced,
    "Identity": _reshape,
    "LeakyRelu": _leaky,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _arithmetic,
    "Neg": lambda step: step.scaled(step.value(0), -1.0, 0.0),
    "Pad": onnx_moves.pad,
    "ReduceMean": _reduced,
    "ReduceSum": _reduced,
    "Relu": _activation(Relu),
    "Reshape": _reshape,
    "Resize": onnx_moves.resize,
    "ScatterElements": onnx_moves.scatter,
    "ScatterND": onnx_moves.scatter,
    "Sigmoid": _activation(Sigmoid),
    "Slice": onnx_moves.moved(0),
    "SpaceToDepth": onnx_moves.moved(0),
    "Split": onnx_moves.moved(0),
    "Squeeze": _reshape,
    "Sub": _arithmetic,
    "Tanh": _activation(Tanh),
    "Tile": onnx_moves.moved(0),
    "Transpose": onnx_moves.moved(0),
    "Trilu": onnx_moves.moved(0),
    "Unsqueeze": _reshape,
    "Upsample": onnx_moves.resize,
    "Where": onnx_moves.where,
    **onnx_scalar.RULES,
    **onnx_products.RULES,
    **onnx_norms.RULES,
}
