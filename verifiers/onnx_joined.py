"""Models of several inputs or outputs as models of one, which is what all rules and verifiers know."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .onnx_steps import Shape


def joined(model: onnx.ModelProto, inputs: Sequence[tuple[str, Shape]]) -> onnx.ModelProto:
    """The model with one input (1, N) and one output (1, K), in which its own are flattened and concatenated in their
    order; the model itself where it has one of each.

    Args:
        inputs: names and shapes of the model's inputs, with a batch of one.
    """
    outputs = [output.name for output in model.graph.output]
    if len(inputs) == len(outputs) == 1:
        return model
    whole, nodes = onnx.ModelProto(), list[onnx.NodeProto]()
    whole.CopyFrom(model)
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    prefix = "joined."
    while any(name.startswith(prefix) for name in names):
        prefix += "joined."

    def constant(name: str, values: Sequence[int]) -> str:
        value = numpy_helper.from_array(np.array(values, np.int64))
        nodes.append(helper.make_node("Constant", [], [prefix + name], value=value))
        return prefix + name

    start, total = 0, sum(math.prod(shape) for _, shape in inputs)
    for number, (name, shape) in enumerate(inputs):
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
    named = {name for name, _ in inputs}
    weights = [given for given in model.graph.input if given.name not in named]
    first = helper.make_tensor_value_info(prefix + "inputs", onnx.TensorProto.FLOAT, (1, total))
    last = helper.make_tensor_value_info(prefix + "outputs", onnx.TensorProto.FLOAT, (1, None))
    del whole.graph.node[:], whole.graph.input[:], whole.graph.output[:]
    whole.graph.node.extend(nodes)
    whole.graph.input.extend([first, *weights])
    whole.graph.output.append(last)
    return whole
