"""Measure the errors of torch's and onnxruntime's activation kernels against float64.

    python scripts/measure_activations.py

``KERNEL_ERROR`` of ``bounds/operations/entrywise.py`` was chosen by these measurements. Float32: every 509th of all
numbers up to 8.5e37, four million even ones in [-20, 20] and runs of 65536 neighbours in between, as one long tensor
(vector bodies), in pieces of 1 to 17 (scalar tails) and, in torch, with a stride. Float64: 30,000 numbers against 50
digits. Functions given by pieces (``curves.py``): a part of these float32 numbers, against the same function in
float64, in eps of ``size``, beside the ``error`` that each pays for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mpmath
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from certtrain.bounds.operations import (
    Celu,
    Cos,
    Elu,
    Erf,
    Exp,
    Gelu,
    GeluTanh,
    Hardswish,
    Log,
    Mish,
    Power,
    Reciprocal,
    ScalarCurve,
    Selu,
    Sigmoid,
    Silu,
    Sin,
    Softplus,
    Softsign,
    Sqrt,
    Tanh,
)  # fmt: skip
from certtrain.bounds.operations.entrywise import KERNEL_ERROR

STRIDE, PIECES = 509, 3000
OWN = {kind.kind: kind for kind in (Gelu, GeluTanh, Sigmoid, Silu, Tanh)}
ROOT = math.sqrt(2 / math.pi)


def exact(kind: str, x: Tensor) -> Tensor:
    """The function in float64 without cancellation, exact to a few relative roundings."""
    match kind:
        case "sigmoid":
            return torch.special.expit(x)
        case "tanh":
            return torch.tanh(x)
        case "gelu":
            return x / 2 * torch.special.erfc(-x * math.sqrt(0.5))
        case "gelu_tanh":
            near = x.clamp(-1e3, 1e3)
            return x * torch.special.expit(2 * ROOT * (near + 0.044715 * near**3))
    return x * torch.special.expit(x)


def fifty_digits(kind: str, x: float):
    """The function to fifty digits."""
    x = mpmath.mpf(x)
    match kind:
        case "sigmoid":
            return 1 / (1 + mpmath.exp(-x))
        case "tanh":
            return mpmath.tanh(x)
        case "gelu":
            return x / 2 * mpmath.erfc(-x / mpmath.sqrt(2))
        case "gelu_tanh":
            return x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)))
    return x / (1 + mpmath.exp(-x))


GRAPHS = {  # one or several graphs for each function: its own operator, and the forms that exporters write
    "sigmoid": [["Sigmoid x y"]],
    "tanh": [["Tanh x y"]],
    "gelu": [["Gelu x y"], ["Div x two_root a", "Erf a b", "Add b one c", "Mul x c d", "Mul d half y"]],
    "gelu_tanh": [
        ["Gelu x y approximate"],
        ["Mul x x a", "Mul a x b", "Mul b cube c", "Add x c d", "Mul d root e", "Tanh e f", "Add f one g",
         "Mul x half h", "Mul h g y"],
    ],
    "silu": [["Sigmoid x a", "Mul x a y"]],
}  # fmt: skip
NUMBERS = {"two_root": math.sqrt(2), "one": 1.0, "half": 0.5, "cube": 0.044715, "root": ROOT}


def sessions(kind: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    for number, lines in enumerate(GRAPHS[kind]):
        nodes = []
        for line in lines:
            op, *names = line.split()
            extra = {"approximate": "tanh"} if names[-1] == "approximate" else {}
            names = [name for name in names if name != "approximate"]
            nodes.append(helper.make_node(op, names[:-1], names[-1:], **extra))
        constants = [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in NUMBERS.items()]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
        graph = helper.make_graph(nodes, kind, ends[:1], ends[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model)
        for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            name = f"onnxruntime, graph {number}, {level[4:].lower()}"
            yield name, lambda x, session=session: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def points() -> Tensor:
    every = np.arange(0, 1 << 32, STRIDE, dtype=np.uint64).astype(np.uint32).view(np.float32)
    starts = np.array([-88.5, -16, -15.8, -9.1, -5.9, -3.9, -1.3, -0.75, 0.02, 0.6, 1, 4, 8.9, 15.9], dtype=np.float32)
    runs = (starts.view(np.uint32)[:, None] + np.arange(1 << 16, dtype=np.uint32)).ravel().view(np.float32)
    even = np.linspace(-20, 20, 1 << 22, dtype=np.float32)
    found = torch.from_numpy(np.concatenate([every, runs, even]))
    return found[found.abs() < torch.finfo(torch.float32).max / 4]  # nothing is certified beyond


def largest_error(kind: str, kernel: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """The largest error / max(1, |x|), and its x. NaN counts as infinite."""
    worst, place = 0.0, 0.0
    for part in x.split(1 << 21):
        wide = part.double()
        error = (kernel(part).double() - exact(kind, wide)).abs() / wide.abs().clamp(min=1)
        error = error.nan_to_num(math.inf)
        if float(error.max()) > worst:
            worst, place = float(error.max()), float(part[error.argmax()])
    return worst, place


def in_pieces(kernel: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        parts, first, size = [], 0, 0
        while first < len(x):
            size = size % 17 + 1
            parts.append(kernel(x[first : first + size].clone()))
            first += size
        return torch.cat(parts)

    return run


CURVES: list[tuple[ScalarCurve, str, float]] = [  # operation, ONNX operator, the domain's lower end
    (Exp("", (0,)), "Exp", -math.inf), (Log("", (0,)), "Log", 0.0), (Sqrt("", (0,)), "Sqrt", 0.0),
    (Reciprocal("", (0,)), "Reciprocal", -math.inf), (Erf("", (0,)), "Erf", -math.inf),
    (Sin("", (0,)), "Sin", -math.inf), (Cos("", (0,)), "Cos", -math.inf),
    *((Power("", (0,), p), "Pow", -math.inf) for p in (2.0, 3.0, 4.0, -2.0)),
    *((Power("", (0,), p), "Pow", 0.0) for p in (2.5, 0.25, -0.5)),
    (Softplus("", (0,)), "Softplus", -math.inf), (Softplus("", (0,), 1.0, 20.0), "", -math.inf),
    (Softsign("", (0,)), "Softsign", -math.inf), (Elu("", (0,)), "Elu", -math.inf), (Celu("", (0,)), "Celu", -math.inf),
    (Selu("", (0,)), "Selu", -math.inf), (Hardswish("", (0,)), "HardSwish", -math.inf),
    (Mish("", (0,)), "Mish", -math.inf),
]  # fmt: skip


def curve_errors(curve: ScalarCurve, op: str, above: float, x: Tensor) -> None:
    """Print the largest errors of one function's kernels."""
    kernels: dict[str, Callable[[Tensor], Tensor]] = {"torch": curve, "torch, pieces": in_pieces(curve)}
    if op:
        inputs = ["x", "p"] if op == "Pow" else ["x"]
        more = [helper.make_tensor("p", TensorProto.FLOAT, [], [curve.exponent])] if isinstance(curve, Power) else []
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
        graph = helper.make_graph([helper.make_node(op, inputs, ["y"])], op, ends[:1], ends[1:], more)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        kernels["onnxruntime"] = lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        kernels["onnxruntime, pieces"] = in_pieces(kernels["onnxruntime"])
    x, info = x[x > above], torch.finfo(torch.float32)
    for name, kernel in kernels.items():
        at = x[:: max(1, len(x) // 20_000)] if "pieces" in name else x
        exact, size = curve(at.double()), curve.size(at, at).double()
        error = ((kernel(at).double() - exact).abs().nan_to_num(math.inf) - info.tiny).clamp(min=0) / (info.eps * size)
        error = torch.where((exact.abs() < info.max) & (size > 0), error, 0.0)
        place = f"{float(error.max()):.2f} eps at {float(at[error.argmax()]):.6g}"
        print(f"{curve.kind:16} {name:20} {place}, paid {curve.error}", flush=True)


def main() -> None:
    x = points()
    for curve, op, above in CURVES:
        curve_errors(curve, op, above, x[::4])
    near = x[(x.abs() < 30) & (x.abs() > 1e-3)]
    few = torch.cat([x[torch.randint(len(x), (PIECES * 9,))], near[torch.randint(len(near), (PIECES * 9,))]])
    print(f"{len(x)} numbers; torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), "
          f"onnxruntime {onnxruntime.__version__}; error / max(1, |x|)")  # fmt: skip
    for kind in GRAPHS:
        own = OWN[kind]("", (0,))
        strided = lambda x, own=own: own(torch.stack([x, x], 1)[:, 0])  # noqa: E731
        kernels = [("torch", own), ("torch, strided", strided), *sessions(kind)]
        for name, kernel in kernels:
            body, at = largest_error(kind, kernel, x)
            tail, tail_at = largest_error(kind, in_pieces(kernel), few)
            print(f"{kind:10} {name:42} {body:.2e} at {at:<14.6g} pieces {tail:.2e} at {tail_at:.6g}", flush=True)
        with mpmath.workdps(50):
            some = torch.cat([12 * torch.randn(15_000).double(), 10 ** torch.linspace(-30, 30, 15_000).double()])
            found = own(some).tolist()
            worst = max(
                float(abs(mpmath.mpf(v) - fifty_digits(kind, at)) / max(1, abs(at)))
                for v, at in zip(found, some.tolist())
            )
        print(f"{kind:10} torch, float64 {worst:.2e}")
    paid = [KERNEL_ERROR * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)]
    print(f"paid for: {paid[0]:.2e} in float32, {paid[1]:.2e} in float64")


if __name__ == "__main__":
    main()
