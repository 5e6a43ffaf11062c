"""ONNX operators on several computed values, reductions, and softmax: their rules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..bounds.operations import (
    LogSoftmax,
    LogSumExp,
    MatrixProduct,
    MaxPool,
    Operation,
    Power,
    Product,
    Quotient,
    Softmax,
    Sum,
)  # fmt: skip
from ..bounds.operations.extremes import largest
from ..bounds.operations.rows import Along, LastOnes
from ..typed import as_ints, broadcast_shape
from . import onnx_gates
from .onnx_steps import OnnxStep, Value, numbers


def arithmetic(step: OnnxStep) -> Value:
    """Add, Sub, Mul or Div of two computed values, which broadcast against each other."""
    kind = step.node.op_type
    if kind == "Mul" and (activated := onnx_gates.product(step)) is not None:
        return activated
    values = [step.value(0), step.value(1)]
    if kind == "Mul" and values[0] == values[1]:
        return step.append(Power, values[0], step.shape, 2.0)
    values = [step.aligned(value) for value in values]
    match kind:
        case "Mul":
            return _of(step, Product, values)
        case "Div":
            return _of(step, Quotient, values)
        case _:
            return step.add(values, -1.0 if kind == "Sub" else 1.0)


def _of(step: OnnxStep, kind: type[Operation], values: list[Value]) -> Value:
    """Append an operation of several values, which gives the step's shape."""
    step.run.operations.append(kind(step.path, tuple(value.position for value in values)))
    return Value(len(step.run.operations) - 1, step.shape)


def matrix_product(step: OnnxStep) -> Value:
    """MatMul of two computed values."""
    first, second = step.value(0), step.value(1)
    shapes = [first.shape if len(first.shape) > 1 else (1, *first.shape)]
    shapes += [second.shape if len(second.shape) > 1 else (*second.shape, 1)]
    rank = max(map(len, shapes))
    shapes = [(*[1] * (rank - len(shape)), *shape) for shape in shapes]
    whole = (*broadcast_shape(shapes[0][:-2], shapes[1][:-2]), shapes[0][-2], shapes[1][-1])
    lead = (1,) if rank == 2 or whole[0] > 1 else ()  # the dimension that operations do not hold
    values = [step.reshaped(value, (*lead, *shape)) for value, shape in zip((first, second), shapes)]
    product = _of(step, MatrixProduct, values)
    return step.reshaped(Value(product.position, (*lead, *whole)))


def total(step: OnnxStep) -> Value:
    """Sum and Mean of any number of values, constants among them."""
    count = len(step.node.input)
    computed = [step.aligned(step.value(number)) for number in range(count) if step.computed(number)]
    constants = [step.constant(number).double() for number in range(count) if not step.computed(number)]
    result = computed[0]
    for value in computed[1:]:
        shape = broadcast_shape(result.shape, value.shape)
        step.run.operations.append(Sum(step.path, (result.position, value.position)))
        result = Value(len(step.run.operations) - 1, tuple(shape))
    share = 1 / count if step.node.op_type == "Mean" else 1.0
    if not constants and share == 1:
        return step.reshaped(result)
    shift = sum(constants, torch.zeros((), dtype=torch.float64))
    return step.scaled(result, share, share * shift, roundings=2 + count)


def _signed(step: OnnxStep, value: Value, sign: float) -> Value:
    return value if sign > 0 else step.times(value, sign)


def axes_of(step: OnnxStep) -> list[int]:
    """The dimensions over which a reduction runs, as numbers >= 0; none of them if it changes nothing."""
    rank = len(step.value(0).shape)
    axes = step.attributes.get("axes", as_ints(step.constant(1)) if step.has(1) else [])
    if step.node.op_type.startswith("Global"):
        axes = list(range(2, rank))
    elif not axes:
        axes = [] if step.attributes.get("noop_with_empty_axes") else list(range(rank))
    return sorted({axis % rank for axis in axes})


def reduced_last(step: OnnxStep) -> Value:
    """The input with the dimensions of a reduction joined, as the last one."""
    value, gone = step.value(0), axes_of(step)
    kept = [axis for axis in range(len(value.shape)) if axis not in gone]
    moved = numbers(value.shape).permute(*kept, *gone).reshape(*(value.shape[axis] for axis in kept), -1)
    return step.picked(value, moved)


def reduced_extreme(step: OnnxStep) -> Value:
    """ReduceMax, ReduceMin and GlobalMaxPool."""
    sign = -1.0 if step.node.op_type == "ReduceMin" else 1.0
    value = _signed(step, reduced_last(step), sign)
    value = step.append(MaxPool, value, (*value.shape[:-1], 1), largest, 1)
    return step.reshaped(_signed(step, value, sign))


def reduced_log_sum_exp(step: OnnxStep) -> Value:
    value = reduced_last(step)
    return step.reshaped(step.append(LogSumExp, value, (*value.shape[:-1], 1), LastOnes(1)))


def softmax(step: OnnxStep) -> Value:
    """Softmax and LogSoftmax; below opset 13 over all dimensions from ``axis`` on together, by default from 1."""
    kind = Softmax if step.node.op_type == "Softmax" else LogSoftmax
    value, old = step.value(0), step.opset < 13
    rank = len(value.shape)
    axis = step.attributes.get("axis", 1 if old else -1)
    axis = axis + rank if axis < 0 else axis
    if not 0 <= axis < max(rank, 1):
        step.refuse(f"axis={axis} of {rank} dimensions", "one of them")
    if old:
        value = step.reshaped(value, (1, math.prod(value.shape[:axis]), math.prod(value.shape[axis:])))
        axis = 2
    elif axis == 0 or rank == 1:  # a dimension that operations may not hold
        value, axis = step.reshaped(value, (1, *value.shape)), axis + 1
    along = Along(axis - len(value.shape), f"{step.run.path}: {step.node.op_type} {step.path!r}")
    return step.reshaped(step.append(kind, value, value.shape, along))


RULES: dict[str, Callable[[OnnxStep], Value]] = {
    "GlobalMaxPool": reduced_extreme,
    "LogSoftmax": softmax,
    "Mean": total,
    "ReduceLogSumExp": reduced_log_sum_exp,
    "ReduceMax": reduced_extreme,
    "ReduceMin": reduced_extreme,
    "Softmax": softmax,
    "Sum": total,
}
"""By the operator's name."""
