"""``capabilities``, also called ``supports``: what can be verified, in the words of the VNN-LIB standard.

The answers are written down here, so that they need no import of torch; tests compare them with the readers.
"""

from __future__ import annotations

import argparse

ONNX_OPERATORS = (
    "Abs", "Add", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Celu", "Clip", "Concat", "Constant", "Conv",
    "ConvTranspose", "Cos", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Elu", "Erf", "Exp", "Expand",
    "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool",
    "GlobalMaxPool", "GroupNormalization", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization",
    "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "LpNormalization", "MatMul", "Max", "MaxPool", "Mean",
    "Min", "Mish", "Mul", "Neg", "PRelu", "Pad", "Pow", "QuantizeLinear", "RMSNormalization", "Reciprocal",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
    "ReduceSumSquare", "Relu", "Reshape", "Resize", "Round", "Scatter", "ScatterElements", "ScatterND", "Selu",
    "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split",
    "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Tile", "Transpose", "Trilu", "Unsqueeze",
    "Upsample", "Where",
)  # fmt: skip
CAPABILITIES: dict[str, tuple[str, ...]] = {
    "onnx-opset-versions": ("7", "23"),
    "onnx-element-types": ("float32", "real"),
    "onnx-operators": ONNX_OPERATORS,
    "vnnlib-versions": ("1.0", "2.0"),
    "hidden-node-theories": ("NH", "H"),
    "multiple-input-output-theories": ("SIO", "MIO"),
    "multiple-network-theories": ("SNET", "MENET", "MINET", "MNET"),
    "multiple-node-comparison-theories": ("SNC", "MNC"),
    "arithmetic-complexity-theories": ("BND", "OUTC", "LIN"),
    "optimised-disjunctive-reasoning": ("false",),
    "serialise-assignments": ("true",),
}
"""Lines of the answer on each capability."""


def add(commands) -> None:
    capabilities = commands.add_parser(
        "capabilities",
        aliases=["supports"],
        help="say what can be verified, in the words of the VNN-LIB standard",
        usage="certtrain capabilities [--CAPABILITY]",
        description="Print what is supported of a capability, an item a line; of all where none is named.",
        allow_abbrev=False,
    )
    names = capabilities.add_mutually_exclusive_group()
    for name in CAPABILITIES:
        names.add_argument(f"--{name}", dest="capability", action="store_const", const=name)
    capabilities.add_argument("--debug", action="store_true", help="show the traceback of an error")
    capabilities.set_defaults(run=_capabilities, parser=capabilities)


def _capabilities(options: argparse.Namespace, rest: list[str]) -> int:
    from ..errors import InputError

    if rest:
        accepted = ", ".join(f"--{name}" for name in CAPABILITIES)
        raise InputError(f"capabilities: found {rest[0]!r}; accepted: {accepted}")
    if options.capability is not None:
        print("\n".join(CAPABILITIES[options.capability]))
        return 0
    for name, items in CAPABILITIES.items():
        print(f"{name}: {' '.join(items)}")
    return 0
