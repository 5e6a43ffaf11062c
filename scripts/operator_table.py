"""Write the table of supported operators, docs/operators.md, as the code has them.

    python scripts/operator_table.py > docs/operators.md

Each ONNX operator, module and function with a rule is put into a small network, which is read or traced, folded and
bounded: the columns say what that gave. What a rule refuses is read from its source. ``tests/test_operator_table.py``
compares the committed page with this one. A new rule that needs more than its input gets an example here.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from certtrain.bounds import Interval, LinfBall, UnsupportedOperation, compute_bounds, trace
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.operations.registry import FUNCTIONS, MODULES
from certtrain.bounds.rounding import FLOAT32, REAL, check
from certtrain.verifiers.bounds_so_far import BoundsSoFar
from certtrain.verifiers.onnx_network import HINTS, OnnxNetwork, read_onnx
from certtrain.verifiers.onnx_operators import RULES
from certtrain.verifiers.problem import Problem, Specification
from certtrain.verifiers.stages import AlphaStage

ROW, IMAGE = (1, 4), (1, 4, 4, 4)
WIDTH, RADIUS, STEPS = 6, 0.5, 5
"""Inputs and radius of a network's box, a tenth of it for gradients; steps on slopes."""
HEAD = """# Supported operators

Written by `python scripts/operator_table.py > docs/operators.md`, which puts each into a small network and looks.

- *as*: the operations that it becomes in a network.
- *bounds*: `exact` for an affine map, whose intervals and linear forms are its own; `lines` for intervals, and lines
  above and below.
- *complete*: it is affine or folded into ReLUs, so that branch and bound on their signs decides everything. Others
  stay relaxed there (`bab`), and are split on the inputs alone (`input_split`).
- *slopes*: whether the `alpha` stage moves its lines. *arithmetics*: `all` are `nearest`, `real` and `float32`.
- *gradients*: of interval bounds, so that training goes through it; `zero` for steps.
- *refused: accepted*: what its own errors find, and what they would take instead. Inputs other than the first are
  constants unless the name says otherwise, and the batch dimension stays in front. ONNX operators that move entries
  take fewer than 2^24 of them, and finite constants among them.
"""


@dataclass(frozen=True)
class Example:
    """An operator in a network of its own: its inputs' shape, and what else it needs.

    Args:
        shape: of a computed input. shift: added to it, for functions of positive numbers.
        inputs: of an ONNX operator: "x" and "y" are computed. attributes: of an ONNX operator, or of a module.
        call: of a function. note: which of its uses this is.
    """

    shape: tuple[int, ...] = ROW
    shift: float = 0.0
    inputs: tuple[Any, ...] = ("x",)
    attributes: dict[str, Any] = field(default_factory=dict[str, Any])
    call: Callable[..., Any] | None = None
    note: str = ""
    outputs: int = 1
    opset: int = 21


def floats(*shape: int) -> np.ndarray:
    return np.linspace(-0.9, 0.8, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def of(*inputs: Any, shape: tuple[int, ...] = ROW, shift: float = 0.0, note: str = "", outputs: int = 1,
       opset: int = 21, **attributes: Any) -> Example:  # fmt: skip
    return Example(shape, shift, ("x", *inputs), attributes, None, note, outputs, opset)


CONSTANT, COMPUTED = "with a constant", "of two computed values"
QUANTISING = "QuantizeLinear", "DequantizeLinear"
"""Operators that stand one behind the other."""
FOUR, POSITIVE = floats(4), abs(floats(4)) + np.float32(0.5)
ONNX: dict[str, list[Example]] = {
    **{name: [of(FOUR, note=CONSTANT), of("y", note=COMPUTED)] for name in ("Add", "Sub", "Mul", "Max", "Min")},
    "Div": [of(POSITIVE, note=CONSTANT), of("y", shift=4.0, note=COMPUTED),
            replace(of(shift=4.0, note="of a constant"), inputs=(FOUR, "x"))],
    "Sum": [of("y", FOUR)], "Mean": [of("y", FOUR)],
    "MatMul": [of(floats(4, 3), note=CONSTANT), of("y", shape=(1, 2, 2), note=COMPUTED)],
    "Gemm": [of(floats(4, 3), floats(3), alpha=0.5)],
    "AveragePool": [of(shape=IMAGE, kernel_shape=[2, 2])],
    "MaxPool": [of(shape=IMAGE, kernel_shape=[2, 2])],
    "GlobalAveragePool": [of(shape=IMAGE)], "GlobalMaxPool": [of(shape=IMAGE)],
    "BatchNormalization": [of(POSITIVE, FOUR, FOUR, POSITIVE)],
    "Cast": [of(to=TensorProto.FLOAT)],
    "Clip": [of(np.float32(-0.5), np.float32(0.5))],
    "Concat": [of("y", axis=1)],
    "Conv": [of(floats(2, 4, 3, 3), shape=IMAGE)], "ConvTranspose": [of(floats(4, 2, 3, 3), shape=IMAGE)],
    "DepthToSpace": [of(shape=IMAGE, blocksize=2)], "SpaceToDepth": [of(shape=IMAGE, blocksize=2)],
    **{name: [of(np.float32(0.25), np.int8(3))] for name in QUANTISING},
    "Expand": [of(whole(3, 4))],
    "Gather": [of(whole(2, 0), axis=1)], "GatherElements": [of(whole(2, 0)[None], axis=1)],
    "GatherND": [of(whole(0, 2, 0, 1).reshape(2, 2))],
    "GroupNormalization": [of(FOUR, FOUR, shape=IMAGE, num_groups=2)],
    "InstanceNormalization": [of(FOUR, FOUR, shape=IMAGE)],
    "LayerNormalization": [of(FOUR, FOUR)], "RMSNormalization": [of(FOUR, opset=23)],
    "LeakyRelu": [of(alpha=0.1)], "PRelu": [of(FOUR)],
    "Log": [of(shift=4.0)], "Sqrt": [of(shift=4.0)], "Reciprocal": [of(shift=4.0)],
    "Pow": [of(np.float32(3)), of(np.float32(-0.5), shift=4.0, note="of a fraction")],
    "ThresholdedRelu": [of(shift=1.0)],
    "Pad": [of(whole(0, 1, 0, 2), np.float32(0.3))],
    **{f"Reduce{kind}": [of(whole(1), shape=IMAGE)]
       for kind in ("L1", "LogSumExp", "Max", "Mean", "Min", "Sum", "SumSquare")},
    **{f"Reduce{kind}": [of(whole(1), shape=IMAGE, shift=4.0)] for kind in ("L2", "LogSum")},
    "HardSigmoid": [of(alpha=1.0)],
    "Reshape": [of(whole(1, 2, 2))], "Squeeze": [of(whole(0))], "Unsqueeze": [of(whole(1))],
    "Resize": [of("", np.array([1, 1, 2, 2], np.float32), shape=IMAGE),
               of("", np.array([1, 1, 2, 2], np.float32), shape=IMAGE, mode="linear", note="linear")],
    "Upsample": [of(np.array([1, 1, 2, 2], np.float32), shape=IMAGE, opset=9)],
    "Scatter": [of(whole(2, 0)[None], floats(1, 2), axis=1, opset=10)],
    "ScatterElements": [of(whole(2, 0)[None], floats(1, 2), axis=1)],
    "ScatterND": [of(whole(0, 2).reshape(1, 2), floats(1))],
    "Slice": [of(whole(1), whole(3), whole(1))],
    "Split": [of(whole(2, 2), axis=1, outputs=2)],
    "Tile": [of(whole(1, 2))],
    "Trilu": [of(shape=(1, 2, 2))],
    "Where": [Example(inputs=(np.array([[True, False, True, False]]), "x", "y"))],
}  # fmt: skip


def made(shape: tuple[int, ...] = ROW, /, **options: Any) -> Example:
    return Example(shape, attributes=options)


PADS = {name: made(IMAGE if "2d" in name else (1, 4, 4), padding=1) for name in (
    "ZeroPad1d", "ZeroPad2d", "ReflectionPad1d", "ReflectionPad2d", "ReplicationPad1d", "ReplicationPad2d",
    "CircularPad1d", "CircularPad2d")}  # fmt: skip
CHANNELS: dict[str, Any] = {"in_channels": 4, "out_channels": 2, "kernel_size": 2}
ENCODER: dict[str, Any] = {"d_model": 4, "nhead": 2, "dim_feedforward": 4, "batch_first": True}
TORCH_MODULES: dict[str, Example] = {
    **PADS,
    "ConstantPad1d": made((1, 4, 4), padding=1, value=0.5), "ConstantPad2d": made(IMAGE, padding=1, value=0.5),
    **{f"{kind}{rank}d": made(IMAGE if rank == 2 else (1, 4, 4), kernel_size=2)
       for kind in ("MaxPool", "AvgPool") for rank in (1, 2)},
    **{f"Adaptive{kind}{rank}d": made(IMAGE if rank == 2 else (1, 4, 4), output_size=2)
       for kind in ("MaxPool", "AvgPool") for rank in (1, 2)},
    "Conv1d": made((1, 4, 4), **CHANNELS), "Conv2d": made(IMAGE, **CHANNELS),
    "ConvTranspose1d": made((1, 4, 4), **CHANNELS), "ConvTranspose2d": made(IMAGE, **CHANNELS),
    "BatchNorm1d": made(num_features=4), "BatchNorm2d": made(IMAGE, num_features=4),
    "ChannelShuffle": made(IMAGE, groups=2), "Dropout1d": made((1, 4, 4)), "Dropout2d": made(IMAGE),
    "GroupNorm": made(IMAGE, num_groups=2, num_channels=4), "LayerNorm": made(normalized_shape=4),
    "Hardsigmoid": Example(shift=3.0),
    "RMSNorm": made(normalized_shape=4, eps=1e-5), "InstanceNorm1d": made((1, 4, 4), num_features=4),
    "InstanceNorm2d": made(IMAGE, num_features=4), "Linear": made(in_features=4, out_features=3),
    "PixelShuffle": made(IMAGE, upscale_factor=2), "PixelUnshuffle": made(IMAGE, downscale_factor=2),
    "Softmax": made(dim=-1), "LogSoftmax": made(dim=-1), "Threshold": made(threshold=0.1, value=0.1),
    "Unflatten": made(dim=1, unflattened_size=(2, 2)), "Upsample": made(IMAGE, scale_factor=2),
    "UpsamplingNearest2d": made(IMAGE, scale_factor=2), "UpsamplingBilinear2d": made(IMAGE, scale_factor=2),
    "Flatten": made(IMAGE),
    "MultiheadAttention": Example((1, 2, 4), attributes={"embed_dim": 4, "num_heads": 2, "batch_first": True},
                                  call=lambda layer, x: layer(x, x, x, need_weights=False)[0]),
    "TransformerEncoderLayer": made((1, 2, 4), **ENCODER),
    "TransformerEncoder": made((1, 2, 4), encoder_layer=nn.TransformerEncoderLayer(**ENCODER), num_layers=2),
}  # fmt: skip


def called(call: Callable[..., Any], shape: tuple[int, ...] = ROW, shift: float = 0.0, note: str = "") -> Example:
    return Example(shape, shift, call=call, note=note)


F: Any = functional
TORCH_FUNCTIONS: dict[str, list[Example]] = {
    **{name: [called(lambda x, y, name=name: getattr(torch, name)(x, y), note=COMPUTED)]
       for name in ("mul", "maximum", "minimum", "max", "min")},
    **{name: [called(lambda x, y: x / (y + 4.0), note=COMPUTED)] for name in ("div", "truediv")},
    "matmul": [called(lambda x, y: x @ y, (1, 2, 2), note=COMPUTED)],
    "bmm": [called(lambda x, y: torch.bmm(x, y), (1, 2, 2), note=COMPUTED)],
    **{name: [called(lambda x, name=name: getattr(x, name)(), shift=4.0)]
       for name in ("log", "sqrt", "reciprocal", "rsqrt")},
    "pow": [called(lambda x: x**3)],
    "view": [called(lambda x: x.view(-1, 2, 2))], "reshape": [called(lambda x: x.reshape(-1, 2, 2))],
    "flatten": [called(lambda x: x.flatten(1), IMAGE)], "getitem": [called(lambda x: x[:, 1:])],
    **{f"{kind}_pool{rank}d": [called(lambda x, name=f"{kind}_pool{rank}d": getattr(F, name)(x, 2),
                                      IMAGE if rank == 2 else (1, 4, 4))]
       for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for rank in (1, 2)},
    **{name: [called(lambda x, name=name: getattr(torch, name)(x, -1))]
       for name in ("softmax", "log_softmax")},
    "logsumexp": [called(lambda x: x.logsumexp(1), IMAGE)],
    "hardsigmoid": [called(lambda x: F.hardsigmoid(x), shift=3.0)],
    "special_erf": [called(torch.special.erf)],
    **{name: [called(lambda x, name=name: getattr(x, name)())]
       for name in ("contiguous", "clone", "float", "positive")},
    **{name: [called(lambda x, name=name: getattr(x, name)(1), IMAGE)]
       for name in ("mean", "sum", "amax", "amin")},
    "scaled_dot_product_attention": [called(lambda x: F.scaled_dot_product_attention(x, x, x), (1, 2, 2))],
    **{name: [called(lambda x, name=name: getattr(F, name)(x, training=False), IMAGE)]
       for name in ("dropout", "dropout2d", "alpha_dropout")},
    "dropout1d": [called(lambda x: F.dropout1d(x, training=False), (1, 4, 4))],
    "feature_dropout": [called(lambda x: torch.feature_dropout(x, 0.5, False), IMAGE)],
    **{name: [called(lambda x, name=name: getattr(F, name)(x, scale_factor=2), IMAGE)]
       for name in ("interpolate", "upsample")},
    "permute": [called(lambda x: x.permute(0, 2, 3, 1), IMAGE)],
    **{name: [called(lambda x, name=name: getattr(torch, name)(x, 1, 2), IMAGE)]
       for name in ("transpose", "swapaxes", "swapdims", "movedim", "moveaxis")},
    "flip": [called(lambda x: x.flip(1))], "roll": [called(lambda x: x.roll(1, 1))],
    "squeeze": [called(lambda x: x.squeeze(1), (1, 1, 4))], "unsqueeze": [called(lambda x: x.unsqueeze(1))],
    "unflatten": [called(lambda x: x.unflatten(1, (2, 2)))], "narrow": [called(lambda x: x.narrow(1, 0, 2))],
    "select": [called(lambda x: x.select(1, 0), IMAGE)], "expand": [called(lambda x: x.expand(-1, 3, 4), (1, 1, 4))],
    "repeat": [called(lambda x: x.repeat(1, 2))], "tile": [called(lambda x: x.tile(1, 2))],
    "repeat_interleave": [called(lambda x: x.repeat_interleave(2, 1))],
    "chunk": [called(lambda x: x.chunk(2, 1)[0])], "split": [called(lambda x: x.split(2, 1)[0])],
    "tensor_split": [called(lambda x: x.tensor_split(2, 1)[0])], "unbind": [called(lambda x: x.unbind(1)[0], IMAGE)],
    "pad": [called(lambda x: F.pad(x, (1, 1)))],
    "pixel_shuffle": [called(lambda x: F.pixel_shuffle(x, 2), IMAGE)],
    "pixel_unshuffle": [called(lambda x: F.pixel_unshuffle(x, 2), IMAGE)],
    "channel_shuffle": [called(lambda x: F.channel_shuffle(x, 2), IMAGE)],
    "to": [called(lambda x: x.to(torch.float32))], "type": [called(lambda x: x.type(torch.float32))],
    "clamp": [called(lambda x: x.clamp(-0.5, 0.5))], "clip": [called(lambda x: x.clip(-0.5, 0.5))],
    "clamp_": [called(lambda x: (x * 1.0).clamp_(-0.5, 0.5))],
    "clamp_min": [called(lambda x: x.clamp_min(0.1))], "clamp_max": [called(lambda x: x.clamp_max(0.1))],
    **{name: [called(lambda x, name=name: getattr(F, name)(x, 0.1, 0.1))] for name in ("threshold", "_threshold")},
    "layer_norm": [called(lambda x: F.layer_norm(x, (4,)))],
    "rms_norm": [called(lambda x: F.rms_norm(x, (4,), eps=1e-5))],
    "group_norm": [called(lambda x: F.group_norm(x, 2), IMAGE)],
    "instance_norm": [called(lambda x: F.instance_norm(x), IMAGE)],
    "norm": [called(lambda x: x.norm(dim=-1), IMAGE)],
    **{name: [called(lambda x, name=name: getattr(torch.linalg, name.removeprefix("linalg_"))(x, dim=-1), IMAGE)]
       for name in ("linalg_norm", "linalg_vector_norm")},
    **{name: [called(lambda x, name=name: getattr(x, name)(-1), IMAGE)] for name in ("var", "std")},
    "softmin": [called(lambda x: F.softmin(x, -1))],
    "unfold": [called(lambda x: F.unfold(x, 2), IMAGE)],
    "threshold_": [called(lambda x: F.threshold_(x * 1.0, 0.1, 0.1))],
}  # fmt: skip
LEFT_OUT = {"linear", "prelu", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "batch_norm", "index_select",
            "masked_fill", "masked_fill_"}  # fmt: skip
"""Functions with weights, which are those of the module of that name, with masks, which are products, and with a buffer
of places, which select."""


class Called(nn.Module):
    """A function of one or two values of layers with weights."""

    def __init__(self, example: Example, call: Callable[..., Any]):
        super().__init__()
        count = int(np.prod(example.shape))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, count) for _ in range(1 + (example.note == COMPUTED)))
        noise = torch.Generator().manual_seed(0)
        for layer in self.layers:
            layer.weight.data, layer.bias.data = torch.randn(count, WIDTH, generator=noise) / 2, torch.zeros(count)
        self.call, self.shape, self.shift = call, example.shape[1:], example.shift

    def forward(self, x: Tensor) -> Tensor:
        values = [layer(x).reshape(-1, *self.shape) for layer in self.layers]
        if self.shift:
            values[0] = values[0] + self.shift
        return self.call(*values)


class Layer(Called):
    """A module behind a layer with weights."""

    def __init__(self, example: Example, module: nn.Module):
        super().__init__(example, example.call or (lambda layer, x: layer(x)))
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x).reshape(-1, *self.shape)
        return self.call(self.module, x + self.shift if self.shift else x)


IN_FRONT = {"layers.0", "layers.1", "reshape", "add"}
"""Paths of the operations that examples begin with."""


def of_module(kind: type[nn.Module]) -> nn.Module:
    example = TORCH_MODULES.get(kind.__name__, Example())
    return Layer(example, kind(**example.attributes).eval())


def of_function(name: str, example: Example) -> nn.Module:
    if example.call is not None:
        return Called(example, example.call)
    return Called(example, getattr(functional, name) if hasattr(functional, name) else lambda x: getattr(x, name)())


def of_operator(name: str, example: Example, folder: Path) -> OnnxNetwork:
    """The network of a graph with the operator behind a Gemm or two, as it is read."""
    shape, noise, constants, nodes = example.shape, np.random.default_rng(0), dict[str, Any](), list[onnx.NodeProto]()
    for value in [one for one in ("x", "y") if any(isinstance(read, str) and read == one for read in example.inputs)]:
        count = int(np.prod(shape))
        constants[f"{value} weight"] = noise.normal(size=(WIDTH, count)).astype(np.float32) / 2
        constants[f"{value} bias"] = np.full(count, example.shift, np.float32)
        constants[f"{value} shape"] = whole(*shape)
        nodes.append(helper.make_node("Gemm", ["input", f"{value} weight", f"{value} bias"], [f"{value} row"]))
        nodes.append(helper.make_node("Reshape", [f"{value} row", f"{value} shape"], [value]))
    names = [value if isinstance(value, str) else f"constant {i}" for i, value in enumerate(example.inputs)]
    constants |= {known: value for known, value in zip(names, example.inputs) if not isinstance(value, str)}
    results = [f"result {number}" for number in range(example.outputs)]
    if name in QUANTISING:
        nodes.append(helper.make_node(QUANTISING[0], names, ["whole"], name=QUANTISING[0], **example.attributes))
        nodes.append(helper.make_node(QUANTISING[1], ["whole", *names[1:]], results, name=QUANTISING[1]))
    else:
        nodes.append(helper.make_node(name, names, results, name=name, **example.attributes))
    graph = helper.make_graph(
        nodes, "one", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, WIDTH])],
        [helper.make_tensor_value_info(results[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), known) for known, value in constants.items()],
    )  # fmt: skip
    versions = [helper.make_opsetid("", example.opset)]
    least = max(8, helper.find_min_ir_version_for(versions))
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=versions, ir_version=least))
    model.graph.output[0].type.tensor_type.shape.dim.extend([])  # says nothing where it cannot be inferred
    file = folder / "one.onnx"
    file.write_bytes(model.SerializeToString())
    return read_onnx(file)


def cells(model: nn.Module, own: Callable[[str], bool]) -> tuple[str, ...]:
    """The cells of a row: what bounds of the model over a small box are like. ``own`` knows its paths."""
    shape, noise = torch.Size([WIDTH]), torch.Generator().manual_seed(0)
    parts = dict.fromkeys(type(one).__name__ for one in trace(model, shape).operations[1:] if own(one.path))
    flat = nn.Sequential(model, nn.Flatten()) if len(fold(model, shape).shapes[-1]) != 1 else model
    network, images = fold(flat, shape), torch.rand(1, WIDTH, generator=noise)
    region, center = LinfBall(RADIUS).region(images), images.clone().requires_grad_()
    rows = torch.randn(1, 8, network.shapes[-1].numel(), generator=noise)
    box = compute_bounds(flat, Interval(center, torch.full_like(images, RADIUS / 10)))
    box.upper.sum().backward()
    assert center.grad is not None
    trained = [one for one in model.parameters() if one.grad is not None and bool(one.grad.any())]
    known = crown_bounds(network, region)
    finite = bool(box.upper.isfinite().all() and bound_forms(network, region, rows, known).isfinite().all())
    affine = not network.nonlinear
    through = bool(trained or center.grad.any())
    return (
        ", ".join(f"`{part}`" for part in parts) or "nothing",
        "none" if not finite else "exact" if affine else "lines",
        "yes" if network.piecewise_linear else "no",
        "" if affine else "yes" if slopes_move(flat, region, rows) else "no",
        arithmetics(model, shape),
        "yes" if through or affine else "zero",
    )


def slopes_move(model: nn.Module, region: Any, rows: Tensor) -> bool:
    """Whether the alpha stage's bounds of the rows rise with its steps."""
    specification = Specification(rows, torch.full(rows.shape[:2], -1e3), torch.arange(rows.shape[1]))
    problem = Problem(model.eval(), region, specification, torch.zeros(1, dtype=torch.int64))
    start = BoundsSoFar(fold(model, region.images.shape[1:]), torch.full(rows.shape[:2], -torch.inf), {})
    least = [AlphaStage(steps=steps)(problem, start).known.rows for steps in (0, STEPS)]
    return bool((least[1] > least[0] + 1e-4).any())


def arithmetics(model: nn.Module, shape: torch.Size) -> str:
    network = fold(model, shape, dtype=torch.float64, as_written=True)
    for rounding in (REAL, FLOAT32):
        try:
            check(replace(network, rounding=rounding))
        except UnsupportedOperation:
            return "`nearest`"
    return "all"


# what errors accept


def accepted(rule: Any) -> list[str]:
    """The errors of a rule, and of what it calls in its own rooms, as "found: accepted", in order."""
    found = dict.fromkeys(_accepted(rule, set()))
    return [text for text in found if text.strip("…: ") and not text.startswith(EVERY_MOVE)]


EVERY_MOVE = "… entries", "constants that are not finite among"
"""Beginnings of what the page says once."""


def _accepted(function: Any, visited: set[Any]) -> Iterator[str]:
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isclass(function) and ".operations." in function.__module__ and "__post_init__" in vars(function):
        yield from _errors(vars(function)["__post_init__"], {"self": function})
    if not isinstance(function, FunctionType) or function in visited or not _ours(function):
        return
    visited.add(function)
    known = inspect.getclosurevars(function)
    names = {**known.globals, **known.nonlocals}
    if function.__name__ != "<lambda>":
        yield from _errors(function, names)
    read = {step.argval for step in dis.get_instructions(function) if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF")}
    for name in [name for name in names if name in read]:
        if not (inspect.isclass(names[name]) and "onnx_" in function.__module__):  # a file's rules check first
            yield from _accepted(names[name], visited)


def _errors(function: Any, names: dict[str, Any]) -> Iterator[str]:
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "refuse" and len(node.args) >= 2:
            yield ": ".join(_words(part, names) for part in node.args[-2:])
        elif name == "UnsupportedOperation" and "; accepted: " in (text := _words(node.args[0], names)):
            yield ": ".join(part.rsplit("found ", 1)[-1] for part in text.split("; accepted: "))


def _ours(function: Any) -> bool:
    module = function.__module__
    return ("verifiers.onnx_" in module and "onnx_steps" not in module) or ".bounds.operations." in module


def _words(node: ast.expr, names: dict[str, Any]) -> str:
    """A text of the source; what it fills in is … unless it is known."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part, names) for part in node.values)
    expression = node.value if isinstance(node, ast.FormattedValue) else node
    try:
        value = eval(compile(ast.Expression(expression), "rule", "eval"), {}, dict(names))
    except Exception:  # it names a local variable
        return "…"
    return f"{value:g}" if isinstance(value, float) else str(value)


# the page


def table(rows: list[tuple[str, tuple[str, ...], str]]) -> Iterator[str]:
    """Rows (name, cells, what is accepted); names with the same cells share one."""
    together = dict[tuple[Any, ...], list[str]]()
    for name, row, takes in rows:
        together.setdefault((row, takes), []).append(name)
    yield "| name | as | bounds | complete | slopes | arithmetics | gradients | refused: accepted |"
    yield "|---|---|---|---|---|---|---|---|"
    for (row, takes), names in together.items():
        yield f"| {', '.join(names)} | {' | '.join(row)} | {takes} |".replace("  ", " ")


def refusals(rule: Any) -> str:
    return "; ".join(accepted(rule)).replace("|", "\\|")


def page() -> str:
    """docs/operators.md.

    Raises:
        KeyError: a name in the tables of examples that has no rule any more.
    """
    operators, modules, functions = list[Any](), list[Any](), list[Any]()
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(RULES):
            for example in ONNX.get(name, [Example()]):
                row = cells(of_operator(name, example, Path(folder)).module, lambda path, name=name: path == name)
                operators.append((f"{name} {example.note}".strip(), row, refusals(RULES[name])))
    for kind in sorted(MODULES.keys() - {nn.ChannelShuffle}, key=lambda kind: kind.__name__):
        row = cells(of_module(kind).eval(), lambda path: path not in IN_FRONT)
        modules.append((kind.__name__, row, refusals(MODULES[kind])))
    for name in sorted(FUNCTIONS.keys() - LEFT_OUT):
        for example in TORCH_FUNCTIONS.get(name, [Example()]):
            front = IN_FRONT | ({"reshape_1"} if example.note == COMPUTED else set[str]())
            row = cells(of_function(name, example).eval(), lambda path, front=front: path not in front)
            functions.append((f"{name} {example.note}".strip(), row, refusals(FUNCTIONS[name])))
    ways = dict[str, list[str]]()
    for name, hint in HINTS.items():
        ways.setdefault(hint, []).append(name)
    refused = [f"- {', '.join(names)}: {hint}" for hint, names in ways.items()]
    lines = [
        HEAD, "## ONNX", "", *table(operators), "", "Refused, with what is accepted instead:", "", *refused,
        "", "## Modules of torch.nn", "",
        "Beside these: `ChannelShuffle`, behind an operation that mixes entries.", "", *table(modules),
        "", "## Functions and tensor methods", "",
        "Beside these: `+ - * /` with constants and computed values, `cat`, `stack`, constants; layers as functions,",
        "`linear`, `conv1d`, `conv2d` and `prelu`; `where` and `masked_fill` with a constant condition.", "",
        *table(functions),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's, on functions that it deprecates
    print(page(), end="")
