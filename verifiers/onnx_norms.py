"""ONNX operators that normalise by a value's own statistics: their rules.

They are read as the fused operators compute them: a constant row gives exactly 0 before the bias.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..bounds.operations import Operation
from ..bounds.operations.normalisation import normalise
from ..bounds.operations.rows import Groups, LastOnes, Rows
from .onnx_steps import OnnxStep, Value


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


RULES: dict[str, Callable[[OnnxStep], Value]] = {
    "GroupNormalization": channel_norm,
    "InstanceNormalization": channel_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": layer_norm,
}
"""By the operator's name."""
