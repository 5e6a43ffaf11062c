"""Models of several inputs or outputs as models of one, which is what all rules and verifiers know, and models that
give tensors of their graph as further outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .onnx_steps import Shape


class GraphInput(NamedTuple):
    """An input of a model: its name, its shape with a batch of one, and its element type, float32 or float64."""

    name: str
    shape: Shape
    kind: np.dtype[Any]


def tensor_names(model: onnx.ModelProto) -> list[str]:
    """Names of the tensors that a graph's operators compute, in its order."""
    return [name for node in model.graph.node for name in node.output if name]


def showing(model: onnx.ModelProto, hidden: Sequence[str]) -> onnx.ModelProto:
    """The model with the tensors ``hidden`` of its graph as outputs behind its own, under other names; the model itself
    without any."""
    if not hidden:
        return model
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    prefix = _unused_prefix(model, "hidden.")
    for number, name in enumerate(hidden):
        shown.graph.node.append(helper.make_node("Identity", [name], [f"{prefix}{number}"]))
        shown.graph.output.append(onnx.ValueInfoProto(name=f"{prefix}{number}"))
    return shown


def _unused_prefix(model: onnx.ModelProto, prefix: str) -> str:
    """``prefix``, repeated until no tensor's name begins with it."""
    names, found = [name for node in model.graph.node for name in (*node.input, *node.output)], prefix
    while any(name.startswith(found) for name in names):
        found += prefix
    return found


def joined(model: onnx.ModelProto, inputs: Sequence[GraphInput]) -> onnx.ModelProto:
    """The model with one input (1, N) and one output (1, K), in which its own are flattened and concatenated in their
    order; the model itself where it has one of each.

    Args:
        inputs: the model's inputs, of one element type.
    """
    outputs = [output.name for output in model.graph.output]
    if len(inputs) == len(outputs) == 1:
        return model
    whole, nodes = onnx.ModelProto(), list[onnx.NodeProto]()
    whole.CopyFrom(model)
    prefix = _unused_prefix(model, "joined.")

    def constant(name: str, values: Sequence[int]) -> str:
        value = numpy_helper.from_array(np.array(values, np.int64))
        nodes.append(helper.make_node("Constant", [], [prefix + name], value=value))
        return prefix + name

    start, total = 0, sum(math.prod(given.shape) for given in inputs)
    for number, (name, shape, _) in enumerate(inputs):
        size = math.prod(shape)
        index = constant(f"index{number}", range(start, start + size))
        nodes.append(helper.make_node("Gather", [prefix + "inputs", index], [f"{prefix}part{number}"], axis=1))
        shaped = constant(f"shape{number}", shape)
        nodes.append(helper.make_node("Reshape", [f"{prefix}part{number}", shaped], [name]))
        start += size
    nodes += model.graph.node
    row = constant("row", (1, -1))
    rows = [f"{prefix}row{number}" for number in range(len(outputs))]
    nodes += [helper.make_node("Reshape", [name, row], [flat]) for name, flat in zip(outputs, rows)]
    nodes.append(helper.make_node("Concat", rows, [prefix + "outputs"], axis=1))
    named = {given.name for given in inputs}
    weights = [given for given in model.graph.input if given.name not in named]
    kind = helper.np_dtype_to_tensor_dtype(inputs[0].kind)
    first = helper.make_tensor_value_info(prefix + "inputs", kind, (1, total))
    last = helper.make_tensor_value_info(prefix + "outputs", kind, (1, None))
    del whole.graph.node[:], whole.graph.input[:], whole.graph.output[:]
    whole.graph.node.extend(nodes)
    whole.graph.input.extend([first, *weights])
    whole.graph.output.append(last)
    return whole
