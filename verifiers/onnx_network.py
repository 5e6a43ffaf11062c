"""Reads ONNX files as networks, which are then verified like traced models.

All shapes are those for one input. Values that do not depend on the input, such as shapes that exporters compute, are
computed by onnxruntime, and so are the shapes of all others. The rules are in ``onnx_operators.py``.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from torch import Tensor

from ..bounds.clock import look, looking
from ..bounds.network import NetworkModule
from ..bounds.operations import Input, Rearrangement, UnsupportedOperation
from ..errors import InputError
from .onnx_joined import GraphInput, joined, showing, tensor_names
from .onnx_operators import RULES
from .onnx_scores import ArgMax, ending_at_scores
from .onnx_steps import Construction, OnnxStep, Shape, Value, evaluate, held, session
from .stage import Replay

SUPPORTED = ", ".join(RULES)
BOOLEAN = "a network that ends before it, with comparisons in the property"
HINTS = {
    **dict.fromkeys(("ArgMax", "ArgMin", "Hardmax", "TopK"), "a network that ends before it (onnx.utils.extract_model) "
                    "and a property that compares its scores"),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "OneHot",
                     "IsNaN", "IsInf", "NonZero"), BOOLEAN),
    **dict.fromkeys(("If", "Loop", "Scan"), "a network without branches and loops"),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "its steps written out, as sums, products, Sigmoid and Tanh"),
    **dict.fromkeys(("DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger"),
                    "QuantizeLinear and DequantizeLinear with constant scales, around operators of floats"),
    "Einsum": "MatMul, Mul and ReduceSum", "NonMaxSuppression": "a network that ends before it",
}  # fmt: skip
"""The way out for operators without a rule."""
# their results differ from call to call, or they contain operators that read names from outside
NOT_CONSTANT = {"Bernoulli", "Dropout", "If", "Loop", "Multinomial", "RandomNormal", "RandomNormalLike",
                "RandomUniform", "RandomUniformLike", "Scan", "SequenceMap"}  # fmt: skip

OF_INTEGERS = {"Cast", "Concat", "DepthToSpace", "DequantizeLinear", "Expand", "Flatten", "Gather", "GatherElements",
               "GatherND", "Identity", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
               "Unsqueeze"}  # fmt: skip
"""Operators that do with quantised values what they do with real ones; others round or overflow."""
WEIGHTED = {"BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators with weights, which are exact in their network's dtype; other constants stay beside it in float64."""


class HiddenTensorError(InputError):
    """A tensor that a graph does not compute from its inputs in their element type.

    Args:
        tensor: its name.
    """

    def __init__(self, tensor: str, message: str):
        super().__init__(message)
        self.tensor = tensor


@dataclass(frozen=True, eq=False)
class OnnxNetwork:
    """A network read from an ONNX file.

    Args:
        module: (B, *shape) → (B, outputs), for bounds and verifiers like any model.
        shape: shape of one input without the batch dimension. A file's first dimension is the batch if it is dynamic,
            or 1 and not the only one; otherwise ``shape`` is the file's whole shape. Several inputs are flattened and
            concatenated.
        outputs: number of outputs, flattened, of all of the file's output tensors, hidden tensors behind them.
        model: the file's content, weights included; with one input and output, without operators on which the output
            does not depend; with hidden tensors as outputs behind its own.
        inputs: the file's input tensors. computed: shapes of its output tensors, with a batch of one; then those of
            the hidden tensors.
        hidden: names of the tensors of its graph that it gives behind its outputs.
        chosen: of a file whose output is the index of its largest score, an ArgMax: module, outputs and model give the
            scores in its place; None of others.
        dtype: of the module: float64 for a file whose weights float32 does not hold, else as asked for.
    """

    module: NetworkModule
    shape: torch.Size
    outputs: int
    model: onnx.ModelProto
    inputs: tuple[GraphInput, ...]
    computed: tuple[Shape, ...]
    hidden: tuple[str, ...]
    dtype: torch.dtype
    chosen: ArgMax | None = None

    @property
    def own_outputs(self) -> int:
        """The number of outputs without hidden tensors."""
        return self.outputs - sum(math.prod(shape) for shape in self.computed[len(self.computed) - len(self.hidden) :])

    def replay(self) -> Replay:
        """Replays of the file's network by onnxruntime, as ``replay_session`` gives them."""
        return replay_session(self.model, len(self.hidden))


def read_onnx(path: str | Path, hidden: Sequence[str] = (), dtype: torch.dtype = torch.float32) -> OnnxNetwork:
    """Read the network in an ONNX file, plain or gzipped, with its weights inside or in files of the same folder.

    Args:
        hidden: names of tensors of its graph, computed from the inputs, which the network gives behind its outputs.
        dtype: float64 for a network in float64 even where float32 holds its weights.
    Raises:
        UnsupportedOperation: an operator without a rule, or used in a way without one; names it.
        InputError: no such file, or no valid model; an input that is not float32, or has a dynamic dimension other than
            the first; an output that does not depend on the inputs.
        HiddenTensorError: a hidden tensor that the graph does not compute from the inputs, or of another type.
    """
    path = Path(path)
    file = load_onnx(path)
    cut = ending_at_scores(file)
    file = file if cut is None else cut.model
    look()
    inputs = _inputs(file, path)
    if hidden:
        file = showing(file, hidden)
        _check_hidden(file, hidden, inputs[0].kind, path)
    if len({given.kind for given in inputs}) > 1:
        kinds = ", ".join(f"{given.name!r} {given.kind}" for given in inputs)
        raise InputError(f"{path}: found inputs {kinds}; accepted: inputs of one element type")
    model = joined(file, inputs)
    (whole,) = _inputs(model, path)
    outputs = [output.name for output in model.graph.output]
    live = _live(list(model.graph.node), outputs[0])
    del model.graph.node[:]
    model.graph.node.extend(live)
    nodes = _computed(model, whole.name, path)
    run = _construction(model, nodes, whole, dtype, path)
    for node in looking(nodes):
        for output in (output for output in node.output if run.readers[output]):
            step = OnnxStep(run, node, output)
            if output != node.output[0] and node.op_type != "Split":
                step.refuse(f"a second output {output!r} that is read", "the first output alone")
            if node.op_type not in OF_INTEGERS:
                step.refuse_integers()
            run.values[output] = RULES[node.op_type](step)
    if outputs[0] not in run.values:
        raise InputError(
            f"{path}: found an output {outputs[0]!r} that is constant; accepted: one computed from the input"
        )
    value = run.values[outputs[0]]
    logits = run.reshaped(value, (1, math.prod(value.shape)), "output")
    if logits.position == 0:
        run.operations.append(Rearrangement("output", (0,), lambda x: x.flatten(1)))
    module = NetworkModule(run.operations)
    for name, output in zip(hidden, file.graph.output[len(file.graph.output) - len(hidden) :]):
        if output.name not in run.values:
            accepted = "a hidden tensor computed from the input"
            raise HiddenTensorError(name, f"{path}: found {name!r}, a constant; accepted: {accepted}")
    computed = tuple(_shape_of(output, run) for output in file.graph.output)
    chosen = None
    if cut is not None:
        cut.check(computed[0], path)
        computed, chosen = ((1,), *computed[1:]), cut.rule
    return OnnxNetwork(
        module, torch.Size(held(whole.shape)), logits.shape[1], file, tuple(inputs), computed, tuple(hidden), run.dtype,
        chosen,
    )  # fmt: skip


def replay_session(model: onnx.ModelProto, hidden: int = 0) -> Replay:
    """A function that replays counterexamples: one input (*shape) → float32 logits (R, K) by onnxruntime on the CPU.
    Several inputs and outputs are flattened and concatenated.

    The first run evaluates the file's own operators, unfused, in the shape that the file declares; the second has the
    default optimisations, as in VNN-COMP's scorer. They differ by 1e-6 of the logits' size, because convolutions of
    several channels are summed in another order. Where onnxruntime refuses the second run, R is 1.

    Args:
        hidden: how many of the last outputs are hidden tensors. Optimisations leave operators before these apart, so a
            third run has the second's hidden tensors behind the outputs of the model without them, as others run it.
    """
    inputs = _inputs(model, Path())
    sizes, sessions = [math.prod(given.shape) for given in inputs], [session(model)]
    try:
        optimised = [session(model, optimised=True)]
        if hidden:
            bare = onnx.ModelProto()
            bare.CopyFrom(model)
            del bare.graph.output[-hidden:]
            optimised.append(session(bare, optimised=True))
        for run in optimised:
            run.run(None, {given.name: np.zeros(given.shape, given.kind) for given in inputs})
        sessions += optimised
    except Exception:  # onnxruntime's exceptions have no common base class
        pass

    def replay(image: Tensor) -> Tensor:
        parts = torch.split(image.detach().cpu().double().flatten(), sizes)
        fed = {given.name: part.numpy().astype(given.kind).reshape(given.shape) for given, part in zip(inputs, parts)}
        runs = [[np.asarray(output).reshape(-1) for output in run.run(None, fed)] for run in sessions]
        runs = [[*outputs, *runs[1][len(outputs) :]] if number else outputs for number, outputs in enumerate(runs)]
        return torch.as_tensor(np.stack([np.concatenate(outputs) for outputs in runs]))

    return replay


def load_onnx(path: Path) -> onnx.ModelProto:
    """Load an ONNX file, plain or gzipped, with its weights, and check it with ONNX's own checker.

    Raises:
        InputError: no such file, or no valid model.
    """
    accepted = "an ONNX model, plain or gzipped, and weights inside it or in files of its folder"
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        model = onnx.load_model_from_string(content)
        load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)  # pyright: ignore[reportUnknownMemberType]  # takes a bare PathLike too
    except (OSError, EOFError, zlib.error, DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(f"{path}: found {' '.join(str(error).split())}; accepted: {accepted}") from error
    return model


def _inputs(model: onnx.ModelProto, path: Path) -> list[GraphInput]:
    weights = {weight.name for weight in model.graph.initializer}  # old files list weights as inputs too
    inputs = [_input(given, path) for given in model.graph.input if given.name not in weights]
    if not inputs or not model.graph.output:
        raise InputError(f"{path}: found no inputs, or no outputs; accepted: one or more of each")
    return inputs


def _input(given: onnx.ValueInfoProto, path: Path) -> GraphInput:
    kind, place = given.type.tensor_type, f"{path}: input {given.name!r}"
    if kind.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
        found = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise InputError(f"{place}: found elements of type {found}; accepted: FLOAT, which is float32, or DOUBLE")
    sizes = [size.dim_value for size in kind.shape.dim]  # 0 where it is dynamic
    names = [size.dim_param or "?" if size.dim_value < 1 else str(size.dim_value) for size in kind.shape.dim]
    if not sizes or min(sizes[1:], default=sizes[0]) < 1:
        accepted = "sizes that are known, but for a batch dimension in front"
        raise InputError(f"{place}: found shape ({', '.join(names)}); accepted: {accepted}")
    return GraphInput(given.name, (max(sizes[0], 1), *sizes[1:]), helper.tensor_dtype_to_np_dtype(kind.elem_type))


def _check_hidden(shown: onnx.ModelProto, hidden: Sequence[str], kind: np.dtype[Any], path: Path) -> None:
    """
    Raises:
        HiddenTensorError: a name that is no computed tensor's; another element type than the inputs'.
    """
    names = tensor_names(shown)[: -len(hidden)]
    if missing := [name for name in hidden if name not in names]:
        near = ", ".join(get_close_matches(missing[0], names, 8, 0.0))
        accepted = f"names of inputs and of what operators compute, like {near}"
        raise HiddenTensorError(missing[0], f"{path}: found no tensor {missing[0]!r}; accepted: {accepted}")
    element = {np.dtype(np.float32): "tensor(float)", np.dtype(np.float64): "tensor(double)"}[kind]
    try:
        outputs = session(shown).get_outputs()[-len(hidden) :]
    except Exception:  # onnxruntime's exceptions have no common base class; ``_construction`` reports them
        return
    for name, output in zip(hidden, outputs):
        if output.type != element:
            accepted = f"a hidden {element}, as the inputs are"
            raise HiddenTensorError(name, f"{path}: found {name!r}, a {output.type}; accepted: {accepted}")


def _shape_of(output: onnx.ValueInfoProto, run: Construction) -> Shape:
    """The shape of an output, which may be a constant beside others that are computed."""
    value = run.values.get(output.name)
    return value.shape if value else tuple(size.dim_value for size in output.type.tensor_type.shape.dim)


def _live(nodes: list[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """The nodes on which an output depends, in order."""
    needed, live = {output}, list[onnx.NodeProto]()
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input) - {""}  # "" stands for an input that is left out
            live.append(node)
    return live[::-1]


def _computed(model: onnx.ModelProto, name: str, path: Path) -> list[onnx.NodeProto]:
    """The operators, all of them supported, through which the output depends on the input's values. All others give
    constants.

    Raises:
        UnsupportedOperation: one of them has no rule, or a constant is made in a way that onnxruntime cannot repeat.
    """
    computed, known = list[onnx.NodeProto](), {name}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedOperation(
                f"{_place(node, path)}: found domain {node.domain!r}; accepted: operators of ONNX: {SUPPORTED}"
            )
        if node.op_type not in ("Shape", "Size") and known & set(node.input):
            computed.append(node)
            known |= set(node.output) - {""}
            continue
        if node.op_type in NOT_CONSTANT:
            accepted = "constants that are made without branches, loops or random numbers"
            raise UnsupportedOperation(f"{_place(node, path)}: found a constant made by it; accepted: {accepted}")
    computed = _live(computed, model.graph.output[0].name)
    for node in (node for node in computed if node.op_type not in RULES):
        accepted = f"{HINTS[node.op_type]}; or {SUPPORTED}" if node.op_type in HINTS else SUPPORTED
        found = "an operator without a bound rule"
        raise UnsupportedOperation(f"{_place(node, path)}: found {found}; accepted: {accepted}")
    return computed


def _construction(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], given: GraphInput, dtype: torch.dtype, path: Path
) -> Construction:
    """The construction before its first operator, with the shapes and constants that onnxruntime gives at an input of
    zeros; in float64 where ``dtype`` is, or float32 does not hold the weights."""
    output = model.graph.output[0].name
    readers = Counter([output, *(read for node in nodes for read in node.input)])
    weights = {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
    name, shape, kind = given
    names = sorted(readers.keys() - weights.keys() - {name, ""})
    try:
        arrays = dict(zip(names, evaluate(model, np.zeros(shape, kind), names)))
    except Exception as error:  # onnxruntime's exceptions have no common base class
        message = " ".join(str(error).split())
        raise InputError(
            f"{path}: found a model that onnxruntime refuses: {message}; accepted: a model that it runs"
        ) from error
    computed = {output for node in nodes for output in node.output}
    shapes = {read: array.shape for read, array in arrays.items() if read in computed}
    kinds = {name: kind} | {read: array.dtype for read, array in arrays.items() if read in computed}
    constants = weights | {read: array for read, array in arrays.items() if read not in computed}
    weighted = {read for node in nodes if node.op_type in WEIGHTED for read in node.input} & constants.keys()
    exact = all(_is_exact(constants[read]) for read in weighted)
    return Construction(
        str(path), model, shapes, kinds, constants, readers, dtype if exact else torch.float64,
        [Input(name, ())], {name: Value(0, shape)},
    )  # fmt: skip


def _is_exact(array: np.ndarray) -> bool:
    """Whether float32 holds an array exactly."""
    if array.dtype != np.float64:
        return True
    with np.errstate(over="ignore"):
        return np.array_equal(array.astype(np.float32).astype(np.float64), array, equal_nan=True)


def _place(node: onnx.NodeProto, path: Path) -> str:
    return f"{path}: {node.op_type} {node.name or node.output[0]!r}"
