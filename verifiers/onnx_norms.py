"""ONNX operators that normalise by a value's own statistics: their rules.

They are read as the fused operators compute them: a constant row gives exactly 0 before the bias. The chains of
operators that stand for them in older files, over the last dimension, are recognised where they divide, so that their
bounds are those of the norm; but they are read as written, and bounds contain the larger rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..bounds.operations import AveragePool, Centering, CenteringOnce, Operation, Power, Reciprocal, RowNorm, Sum
from ..bounds.operations.normalisation import normalise
from ..bounds.operations.row_norm import SMALLEST
from ..bounds.operations.rows import Along, Groups, LastOnes, Rows
from .onnx_gates import chain, near
from .onnx_steps import Construction, OnnxStep, Value


def _normalised(step: OnnxStep, value: Value, rows: Rows, centered: bool = True) -> Value:
    def append(operation: Operation) -> int:
        step.run.operations.append(operation)
        return len(step.run.operations) - 1

    eps = step.attributes.get("epsilon", 1e-5)
    if not eps > 0:
        step.refuse(f"epsilon={eps}", "a number > 0")
    return Value(normalise(append, step.path, value.position, rows, eps, centered=centered), value.shape)


def _learned(step: OnnxStep, value: Value, weight: Tensor, bias: Tensor | float) -> Value:
    return step.scaled(step.reshaped(value), weight, bias, roundings=3)


def layer_norm(step: OnnxStep) -> Value:
    """LayerNormalization and RMSNormalization, over all dimensions from ``axis`` on."""
    value, rank = step.value(0), len(step.value(0).shape)
    axis = step.attributes.get("axis", -1)
    axis = axis + rank if axis < 0 else axis
    if axis == 0 or rank == 1:  # a dimension that operations may not hold
        value, axis = step.reshaped(value, (1, *value.shape)), axis + 1
    centered = step.node.op_type == "LayerNormalization"
    value = _normalised(step, value, LastOnes(len(value.shape) - axis), centered)
    return _learned(step, value, step.constant(1), step.constant(2) if step.has(2) else 0.0)


def channel_norm(step: OnnxStep) -> Value:
    """InstanceNormalization and GroupNormalization; files with the latter below opset 21 are no valid models."""
    value, (weight, bias) = step.value(0), (step.constant(1), step.constant(2))
    if len(value.shape) < 3 or value.shape[0] != 1:
        step.refuse(f"an input of shape {value.shape}", "(1, channels, …)")
    groups = step.attributes.get("num_groups", 0)
    value = _normalised(step, value, Groups(groups, None, step.path))
    shape = (-1, *[1] * (len(value.shape) - 2))
    return _learned(step, value, weight.reshape(shape), bias.reshape(shape))


def euclidean(step: OnnxStep) -> Value:
    """LpNormalization with p = 2; a row of zeros stays one."""
    value, power = step.value(0), step.attributes.get("p", 2)
    if power != 2:
        step.refuse(f"p={power}", "2")
    rank, axis = len(value.shape), step.attributes.get("axis", -1)
    axis = axis + rank if axis < 0 else axis
    if axis == 0 or rank == 1:  # a dimension that operations may not hold
        value, axis = step.reshaped(value, (1, *value.shape)), axis + 1
    along = Along(axis - len(value.shape), f"{step.run.path}: LpNormalization {step.path!r}")
    return step.reshaped(step.append(RowNorm, value, value.shape, along, 0.0, False, SMALLEST))


def divided(step: OnnxStep) -> Value | None:
    """The norm that a Div by a root, or a Mul with a root's reciprocal, is; else None."""
    run = step.run
    orders = ((0, 1),) if step.node.op_type == "Div" else ((0, 1), (1, 0))
    for own, other in orders:
        value, divisor = step.value(own), step.value(other)
        if divisor.shape != (*value.shape[:-1], 1):
            continue
        root = run.operations[divisor.position]
        inverse = step.node.op_type == "Mul"
        if inverse and isinstance(root, Reciprocal):
            root, inverse = run.operations[root.inputs[0]], False
        if not isinstance(root, Power) or root.exponent != (-0.5 if inverse else 0.5) or step.shape != value.shape:
            continue
        found = _mean_square(run, root.inputs[0], value)
        if found is not None:
            position = _centered(run, value.position, step.path)
            return step.append(RowNorm, Value(position, value.shape), value.shape, LastOnes(1), *found)
    return None


def _mean_square(run: Construction, position: int, value: Value) -> tuple[float, bool] | None:
    """(eps, whether squares are averaged) if eps plus the mean square or the sum of squares of the last dimension of a
    value is at ``position``; else None."""
    count = value.shape[-1]
    for factor, eps, place in chain(run, position):
        operation = run.operations[place]
        function = _reduction(operation)
        square = run.operations[operation.inputs[0]] if function is not None else None
        if not isinstance(square, Power) or square.exponent != 2 or square.inputs != (value.position,) or eps <= 0:
            continue
        share = factor if function is torch.mean else factor * count
        for mean, wanted in ((True, 1.0), (False, float(count))):
            if near(share, wanted):
                return eps, mean
    return None


def _reduction(operation: Operation) -> Callable[..., Tensor] | None:
    """torch.mean or torch.sum, if the operation is one over the last dimension of its input; else None."""
    function: Any = operation.function if isinstance(operation, AveragePool) else None
    if isinstance(function, partial) and function.keywords == {"dim": -1, "keepdim": True}:
        return cast(Any, function).func
    return None


def _centered(run: Construction, position: int, path: str) -> int:
    """Append the value at ``position`` as a centering of rows, if it is x - mean(x); else the position itself.

    Written twice, as files of ours have it, it is that of the fused operators.
    """
    once = _minus_mean(run, position)
    if once is None:
        return position
    twice = _minus_mean(run, once)
    rows = LastOnes(1)
    run.operations.append(CenteringOnce(path, (once,), rows) if twice is None else Centering(path, (twice,), rows))
    return len(run.operations) - 1


def _minus_mean(run: Construction, position: int) -> int | None:
    """The position of x, if x - mean(x) over the last dimension is at ``position``; else None."""
    operation = run.operations[position]
    if not isinstance(operation, Sum) or operation.sign != -1:
        return None
    own, other = operation.inputs
    mean = run.operations[other]
    return own if _reduction(mean) is torch.mean and mean.inputs == (own,) else None


RULES: dict[str, Callable[[OnnxStep], Value]] = {
    "GroupNormalization": channel_norm,
    "InstanceNormalization": channel_norm,
    "LayerNormalization": layer_norm,
    "LpNormalization": euclidean,
    "RMSNormalization": layer_norm,
}
"""By the operator's name."""
