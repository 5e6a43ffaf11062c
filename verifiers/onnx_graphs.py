"""Comparison of ONNX graphs: the same operators on the same shapes, whatever their weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx
from onnx import helper, numpy_helper

from .onnx_network import OnnxNetwork

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


class _Operator(NamedTuple):
    """An operator without its weights. Inputs are numbers of the graph's inputs and of operators' outputs, or shapes of
    constants."""

    kind: str
    attributes: tuple[tuple[str, Any], ...]
    inputs: tuple[Any, ...]


def difference_between(first: OnnxNetwork, second: OnnxNetwork) -> str | None:
    """A few words on how two networks' graphs differ; None where they are isomorphic.

    They are where the operators that lead to their outputs are of the same kinds, with the same integers and words as
    attributes, and read the same tensors; inputs and constants are of the same shapes and element types. Names,
    floats, such as weights and slopes, and the order of independent operators do not count; integer constants, which
    say shapes and axes, do.
    """
    for what, own, other in (
        ("inputs", [(given.shape, str(given.kind)) for given in first.inputs],
         [(given.shape, str(given.kind)) for given in second.inputs]),
        ("outputs", _own_shapes(first), _own_shapes(second)),
    ):  # fmt: skip
        if own != other:
            return f"{what} are {own} and {other}"
    graphs = _operators(first), _operators(second)
    for number, (own, other) in enumerate(zip(*graphs)):
        if own.kind != other.kind:
            return f"operator {number} is {own.kind} and {other.kind}"
        if own != other:
            return f"operator {number}, {own.kind}, has other attributes, inputs or shapes"
    counts = tuple(map(len, graphs))
    return None if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} operators"


def _own_shapes(network: OnnxNetwork) -> list[tuple[int, ...]]:
    return list(network.computed[: len(network.computed) - len(network.hidden)])


def _operators(network: OnnxNetwork) -> list[_Operator]:
    """The operators that lead to the network's own outputs, each behind those that it reads, in the order in which a
    walk from the outputs reaches them."""
    graph = network.model.graph
    makers = {name: node for node in graph.node for name in node.output if name}
    constants: dict[str, Any] = {weight.name: _described(weight) for weight in graph.initializer}
    places: dict[str, Any] = {given.name: ("input", number) for number, given in enumerate(network.inputs)}
    operators: list[_Operator] = []

    def place(name: str) -> Any:
        return places.get(name) or constants.get(name) or name  # "" for an input that is left out

    stack = [output.name for output in graph.output[: len(graph.output) - len(network.hidden)]][::-1]
    while stack:
        name = stack[-1]
        node = makers.get(name)
        if name in places or name in constants or node is None:
            stack.pop()
            continue
        if open_ := [read for read in node.input if read in makers and read not in places and read not in constants]:
            stack += open_[::-1]
            continue
        attributes = [(one.name, _attribute(helper.get_attribute_value(one))) for one in node.attribute]
        if node.op_type == "Constant":
            constants[name] = attributes[0][1]
            continue
        operators.append(
            _Operator(node.op_type, tuple(sorted(attributes, key=lambda one: one[0])), tuple(map(place, node.input)))
        )
        for number, output in enumerate(node.output):
            places[output] = ("operator", len(operators) - 1, number)
    return operators


def _attribute(value: Any) -> Any:
    """The part of an attribute's value that counts."""
    match value:
        case onnx.TensorProto():
            return _described(value)
        case float():
            return "a float"
        case [float(), *_]:
            return f"{len(value)} floats"
        case bytes() | int():
            return value
        case onnx.GraphProto() | onnx.SparseTensorProto():
            return type(value).__name__
        case _:
            return tuple(value)


def _described(tensor: onnx.TensorProto) -> tuple[Any, ...]:
    """The element type and shape of a constant; of integers and truth values the contents, too."""
    array = numpy_helper.to_array(tensor) if tensor.data_type not in FLOATS else None
    return (tensor.data_type, tuple(tensor.dims), None if array is None else array.tobytes())
