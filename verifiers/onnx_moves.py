"""ONNX operators that move, select, repeat or pad entries, and those that resize images.

Entries are moved by onnxruntime itself, on their numbers. Resized images follow the standard's text; where onnxruntime
computes something else, the operator is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from ..bounds.operations import Rearrangement, Resampling, Scale, TransposedConvolution
from ..typed import as_floats, as_ints, unique
from .onnx_steps import OnnxStep, ScaleConstants, Shape, Value, evaluate, fixed, held, numbers

CASTS = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.DOUBLE: "DOUBLE"}


def cast(step: OnnxStep) -> Value:
    """Casts between float32 and float64: both stand for real numbers, and casting to float32 rounds."""
    if step.attributes["to"] not in CASTS:
        found = onnx.TensorProto.DataType.Name(step.attributes["to"])
        step.refuse(f"to={found}", f"{', '.join(CASTS.values())} of a computed value")
    return step.reshaped(step.value(0))


def moved(*data: int) -> Callable[[OnnxStep], Value]:
    """The rule of an operator each of whose outputs is an entry of one of the inputs ``data``, 0 or a constant.

    All other inputs are constants.
    """

    def rule(step: OnnxStep) -> Value:
        parts = [number for number in data if step.computed(number)]
        if not parts:
            step.value(data[0])  # refuses it
        values = [step.value(number) for number in parts]
        total = sum(math.prod(value.shape) for value in values)
        if total >= 2**24:
            step.refuse(f"{total} entries", f"fewer than {2**24}, which float32 can number")
        constants = {i: step.constant(i).numpy() for i in range(len(step.node.input)) if i not in parts and step.has(i)}
        counted, start = dict[int, np.ndarray](), 0
        for number, value in zip(parts, values):
            counted[number] = (numbers(value.shape) + start).numpy().astype(step.kind(number))
            start += math.prod(value.shape)
        zeros = {number: 0 * counted[number] for number in parts}
        places, shift = (_run(step, constants | given) for given in (counted, zeros))
        if not np.isfinite(shift).all():
            step.refuse("constants that are not finite among the output's entries", "finite ones")
        # an entry that is moved differs from 0, what a constant gives does not depend on the numbers
        index = torch.tensor(np.where(places == shift, 0, places)).long()
        whole = values[0] if len(values) == 1 else _joined(step, values)
        picked = step.picked(whole, index)
        return step.scaled(picked, 1.0, torch.tensor(shift)) if shift.any() else picked

    return rule


def _joined(step: OnnxStep, values: list[Value]) -> Value:
    rows = [step.reshaped(value, (1, math.prod(value.shape))) for value in values]
    return step.joined(rows, (1, sum(value.shape[1] for value in rows)), 1)


def _run(step: OnnxStep, inputs: dict[int, np.ndarray]) -> np.ndarray:
    """The operator's output at these arrays, by onnxruntime; the first of them is the graph's input."""
    first, *others = sorted(inputs)
    names = list(step.node.input)
    node = onnx.NodeProto()
    node.CopyFrom(step.node)
    for number in inputs:
        names[number] = f"input {number}"  # an operator may read one name twice
    del node.input[:]
    node.input.extend(names)
    kind = helper.np_dtype_to_tensor_dtype(inputs[first].dtype)
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info(names[first], kind, inputs[first].shape)], [],
        [numpy_helper.from_array(np.asarray(inputs[number]), names[number]) for number in others],
    )  # fmt: skip
    versions = {"opset_imports": step.run.model.opset_import, "ir_version": max(step.run.model.ir_version, 4)}
    (output,) = evaluate(helper.make_model(graph, **versions), inputs[first], [step.output])
    return output


def pad(step: OnnxStep) -> Value:
    mode = step.attributes.get("mode", b"constant").decode()
    pads = step.attributes.get("pads", as_ints(step.constant(1)) if step.has(1) else [])
    if mode != "constant" and min(pads, default=0) < 0:
        step.refuse(f"pads {pads} with mode={mode}", "pads >= 0; the standard leaves open which is done first")
    return moved(0)(step)


def scatter(step: OnnxStep) -> Value:
    """The rule of ScatterND and ScatterElements with constant indices."""
    reduction = step.attributes.get("reduction", b"none").decode()
    if reduction != "none":
        step.refuse(f"reduction={reduction}", "none")
    index, shape = step.constant(1).long(), step.shape
    if step.node.op_type == "ScatterND":
        sizes = torch.tensor(shape[: index.shape[-1]])
        rows = torch.where(index < 0, index + sizes, index).reshape(-1, index.shape[-1])
        twice = len(unique(rows, dim=0)) < len(rows)
    else:
        axis = int(step.attributes.get("axis", 0)) % len(shape)
        index = torch.where(index < 0, index + shape[axis], index)
        ordered = index.sort(axis).values
        twice = bool((ordered.diff(dim=axis) == 0).any())
    if twice:
        step.refuse("an index that occurs twice", "each index once; the standard leaves open which update stays")
    return moved(0, 2)(step)


def where(step: OnnxStep) -> Value:
    if step.computed(0):
        step.refuse("a condition computed from the network's input", "a constant condition")
    return moved(1, 2)(step)


# Resize and Upsample

COORDINATES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric",
               "tf_half_pixel_for_nn")  # fmt: skip
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def resize(step: OnnxStep) -> Value:
    value, attributes = step.value(0), step.attributes
    mode = attributes.get("mode", b"nearest").decode()
    old = step.node.op_type == "Upsample" or len(step.node.input) == 2  # without a choice of coordinates, to opset 10
    coordinates = attributes.get("coordinate_transformation_mode", b"asymmetric" if old else b"half_pixel").decode()
    nearest = attributes.get("nearest_mode", b"floor" if old else b"round_prefer_floor").decode()
    if mode not in ("nearest", "linear"):
        step.refuse(f"mode={mode}", "nearest, linear")
    if coordinates not in COORDINATES:
        step.refuse(f"coordinate_transformation_mode={coordinates}", ", ".join(COORDINATES))
    if attributes.get("antialias", 0):
        step.refuse("antialias=1", "0")
    if attributes.get("exclude_outside", 0) and mode == "linear":
        step.refuse("exclude_outside=1", "0")
    before, after, start = value.shape, step.shape, len(step.run.operations)
    scales = _scales(step, before, after)
    axes = [axis for axis in range(len(before)) if (before[axis], scales[axis]) != (after[axis], 1.0)]
    places = [_coordinates(step, coordinates, before[axis], after[axis], scales[axis]) for axis in axes]
    if mode == "nearest":
        index = numbers(before)
        for axis, place in zip(axes, places):
            index = index.index_select(axis, _nearest(nearest, place).clamp(0, before[axis] - 1))
        result = step.picked(value, index)
    elif value.shape[:1] != (1,) or any(axis < 2 for axis in axes) or len(before) < 3:
        return step.refuse(f"shape {before} and scales {scales}", "an input (1, channels, …) whose places are resized")
    else:
        matrices = [_between(place, before[axis]) for axis, place in zip(axes, places)]
        function = partial(_interpolated, [axis - len(before) for axis in axes], matrices)
        result = step.append(Resampling, value, after, function)
    return _confirmed(step, value, result, start)


def _scales(step: OnnxStep, before: Shape, after: Shape) -> list[float]:
    """The scale of each dimension: as given, or of the sizes."""
    number = 2 if len(step.node.input) > 2 else 1
    given = step.attributes.get("scales")  # an attribute in Upsample 7
    if given is None and step.has(number) and len(step.constant(number)):
        given = as_floats(step.constant(number))
    ratios = [new / old for new, old in zip(after, before)]
    if given is None:
        if step.attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
            step.refuse("keep_aspect_ratio_policy", "stretch")
        return ratios
    axes = step.attributes.get("axes", range(len(before)))
    scales = [1.0] * len(before)
    for axis, scale in zip(axes, given):
        scales[axis] = scale
    return scales


def _coordinates(step: OnnxStep, mode: str, before: int, after: int, scale: float) -> Tensor:
    """x_original of the standard's text, (after,) float64."""
    x = torch.arange(after, dtype=torch.float64)
    match mode:
        case "half_pixel":
            return (x + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            adjustment = after / (scale * before)
            return before / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (x + 0.5) / scale - 0.5 if after > 1 else 0 * x
        case "tf_half_pixel_for_nn":
            return (x + 0.5) / scale
        case "asymmetric":
            return x / scale
        case _:
            if after == 1:
                step.refuse("align_corners of one place", "two or more; the standard divides by 0")
            return x * (before - 1) / (after - 1)


def _nearest(mode: str, x: Tensor) -> Tensor:
    match mode:
        case "floor":
            return x.floor().long()
        case "ceil":
            return x.ceil().long()
        case "round_prefer_floor":
            return (x - 0.5).ceil().long()
        case _:
            return (x + 0.5).floor().long()


def _between(x: Tensor, size: int) -> Tensor:
    """(after, size), the shares of the entries in each interpolated one; the edge continues outside."""
    first, share = x.floor(), x - x.floor()
    weights = torch.zeros(len(x), size, dtype=torch.float64)
    for place, part in ((first, 1 - share), (first + 1, share)):
        weights.scatter_add_(1, place.long().clamp(0, size - 1)[:, None], part[:, None])
    return weights


def _interpolated(axes: Sequence[int], matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    for axis, matrix in zip(axes, matrices):
        x = (x.movedim(axis, -1) @ matrix.to(x).mT).movedim(-1, axis)
    return x


def _confirmed(step: OnnxStep, value: Value, result: Value, start: int) -> Value:
    """``result``, which the operations from ``start`` on compute of ``value``, and onnxruntime has to.

    Raises:
        UnsupportedOperation: it is not.
    """
    image = torch.rand(value.shape, generator=torch.Generator().manual_seed(0))
    constants = {i: step.constant(i).numpy() for i in range(1, len(step.node.input)) if step.has(i)}
    theirs = torch.tensor(_run(step, {0: image.numpy().astype(step.kind(0)), **constants})).float()
    x = {value.position: image.reshape(1, *held(value.shape))}
    for place, operation in enumerate(step.run.operations[start:], start=start):
        x[place] = operation(*(x[read] for read in operation.inputs))
    if theirs.shape != result.shape or not torch.allclose(x[result.position].reshape(theirs.shape), theirs, 1e-4, 1e-5):
        step.refuse("attributes under which onnxruntime departs from the standard's text", "sizes where both agree")
    return result


def transposed_convolution(step: OnnxStep) -> Value:
    value, weight, attributes = step.value(0), step.weight(1), step.attributes
    if len(value.shape) not in (3, 4) or value.shape[0] != 1:
        step.refuse(f"an input of shape {value.shape}", "(1, channels, height, width) or (1, channels, length)")
    places = len(value.shape) - 2
    stride, dilation = (tuple(attributes.get(name, [1] * places)) for name in ("strides", "dilations"))
    extra, groups = tuple(attributes.get("output_padding", [0] * places)), attributes.get("group", 1)
    size, kernel = value.shape[2:], weight.shape[2:]
    # all that the input reaches, of which ``begin`` is cut off in front and ``missing`` added or cut off behind
    reach = [s * (n - 1) + d * (k - 1) + 1 for n, k, s, d in zip(size, kernel, stride, dilation)]
    begin, output = _begin(step, stride, extra, reach), step.shape[2:]
    missing = [n - (r - b) for n, r, b in zip(output, reach, begin)]
    layer = nn.Conv2d(1, 1, 1, device="meta")
    layer.weight = fixed(weight)
    bias = step.constant(2) if step.has(2) else torch.zeros(weight.shape[1] * groups)
    layer.register_parameter("bias", None)
    zeros, start = (0,) * places, len(step.run.operations)
    result = step.append(TransposedConvolution, value, (1, weight.shape[1] * groups, *reach), layer, stride, zeros,
                         zeros, groups, dilation)  # fmt: skip
    around = [width for pair in reversed(list(zip(begin, missing))) for width in (-pair[0], pair[1])]
    if any(around):
        result = step.append(Rearrangement, result, step.shape, partial(F.pad, pad=around))
    if bias.any():
        bias = bias.double().reshape(-1, *[1] * places)
        constants = ScaleConstants(torch.ones((), dtype=torch.float64), bias)
        result = step.append(Scale, result, step.shape, constants, constants.exact, 1)
    return _confirmed(step, value, result, start)


def _begin(step: OnnxStep, stride: tuple[int, ...], extra: tuple[int, ...], reach: list[int]) -> list[int]:
    """The padding in front of each dimension of a transposed convolution, which is cut off."""
    mode, places = step.attributes.get("auto_pad", b"NOTSET").decode(), len(stride)
    size = step.run.values[step.node.input[0]].shape[2:]
    output = step.attributes.get("output_shape")
    if output is None and mode == "NOTSET":
        return list(step.attributes.get("pads", [0] * 2 * places)[:places])
    if output is None and mode == "VALID":
        return [0] * places
    wanted = [n * s for n, s in zip(size, stride)] if output is None else list(output[-places:])
    if tuple(wanted) != step.shape[2:]:
        step.refuse(
            f"auto_pad={mode}, for which onnxruntime gives {step.shape[2:]}", f"sizes of the standard, {wanted}"
        )
    total = [max(r + e - n, 0) for r, e, n in zip(reach, extra, wanted)]
    return [one // 2 if mode == "SAME_UPPER" else one - one // 2 for one in total]
