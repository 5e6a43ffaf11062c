"""Functional forms → nodes of a program: one small rule per name, the table last."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from ..typed import is_slice, is_tuple
from . import program as p

if TYPE_CHECKING:
    from .tracing import Tracing

Rule = Callable[["Tracing", fx.Node, int], int]

SUPPORTED = (
    "Linear, Conv1d/2d, BatchNorm1d/2d, ReLU, LeakyReLU, Sigmoid, Tanh, GELU, SiLU, MaxPool1d/2d, AvgPool1d/2d, "
    "AdaptiveAvgPool1d/2d, AdaptiveMaxPool1d/2d, Flatten, Dropout, Identity, their functional forms, ChannelShuffle "
    "behind a layer, view/reshape/flatten and x[:, a:b] that keep the batch dimension, cat of computed values along "
    "any other dimension, and + - * / with another node (+ and - only) or with constants"
)


class BatchSize:
    """Stands for x.size(0) while tracing."""


def _reshape(tracing: Tracing, node: fx.Node, source: int) -> int:
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    values = [tracing.values.get(size) if isinstance(size, fx.Node) else size for size in sizes]
    keeps_batch = values and (isinstance(values[0], BatchSize) or (values[0] == -1 and -1 not in values[1:]))
    rest = [value for value in values[1:] if type(value) is int and not isinstance(value, fx.Node)]
    if not keeps_batch or len(rest) != len(values) - 1 or any(isinstance(size, fx.Node) for size in sizes[1:]):
        raise p.UnsupportedNode(
            f"{node.target} at {node.name!r}: found sizes {tuple(sizes)}; accepted: x.size(0) or -1 first, then numbers"
        )

    def apply(x: Tensor) -> Tensor:
        # with an empty batch -1 is ambiguous: work it out from the other entries
        known = math.prod(size for size in rest if size != -1)
        return x.reshape(x.shape[0], *(math.prod(x.shape[1:]) // known if size == -1 else size for size in rest))

    return tracing.append(p.Reshape(node.name, (source,), apply))


def _flatten(tracing: Tracing, node: fx.Node, source: int) -> int:
    start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
    end: Any = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
    if not isinstance(start, int) or start < 1:
        raise p.UnsupportedNode(
            f"flatten at {node.name!r}: found start_dim={start}; accepted: 1 or more (keeps the batch)"
        )
    return tracing.append(p.Reshape(node.name, (source,), lambda x: x.flatten(start, end)))


def _slice(tracing: Tracing, node: fx.Node, source: int) -> int:
    index: Any = node.args[1]
    parts = index if is_tuple(index) else (index,)
    ends = [end for part in parts if is_slice(part) for end in (part.start, part.stop, part.step)]
    numbers = len(ends) == 3 * len(parts) and all(end is None or type(end) is int for end in ends)
    if not numbers or parts[:1] != (slice(None),):
        raise p.UnsupportedNode(
            f"{node.name!r}: found x[{index}]; accepted: x[:, a:b, …] with numbers, the batch whole"
        )
    return tracing.append(p.Reshape(node.name, (source,), lambda x: x[parts]))


def _pool(dimensions: int, linear: bool) -> Rule:
    def rule(tracing: Tracing, node: fx.Node, source: int) -> int:
        options, keywords = node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}
        function: Any = node.target
        if keywords.pop("return_indices", False):
            raise p.UnsupportedNode(f"{node.name!r}: max pooling that returns indices has no bound rule")
        if any(isinstance(option, fx.Node) for option in (*options, *keywords.values())):
            raise p.UnsupportedNode(f"{node.name!r}: a pool whose size depends on the images; accepted: numbers")
        pool = p.Pool(node.name, (source,), lambda x: function(x, *options, **keywords), linear, dimensions)
        return tracing.append(pool)

    return rule


def _activation(kind: str) -> Rule:
    return lambda tracing, node, source: tracing.activate(node.name, source, p.Activation(kind))


def _leaky(tracing: Tracing, node: fx.Node, source: int) -> int:
    slope: Any = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
    return tracing.leaky(node.name, source, slope)


def _dropout(tracing: Tracing, node: fx.Node, source: int) -> int:
    raise p.UnsupportedNode(f"F.dropout at {node.name!r} freezes its mode when traced; accepted: nn.Dropout")


def concat(tracing: Tracing, node: fx.Node) -> int:
    """``torch.cat``, whose first argument is a list."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, (list, tuple)) or not parts:
        raise p.UnsupportedNode(f"cat at {node.name!r}: found {parts}; accepted: a list of values")
    if type(dim) is not int or dim == 0 or set(node.kwargs) - {"tensors", "dim"}:
        found = ", ".join([f"dim={dim}", *(name for name in node.kwargs if name not in ("tensors", "dim"))])
        raise p.UnsupportedNode(f"cat at {node.name!r}: found {found}; accepted: a dimension other than the batch's, 0")
    return tracing.append(p.Concat(node.name, tuple(tracing.position(node, part) for part in parts), dim))


FUNCTIONS: dict[str, Rule] = {
    "relu": _activation("relu"),
    "relu_": _activation("relu"),
    "sigmoid": _activation("sigmoid"),
    "tanh": _activation("tanh"),
    "silu": _activation("silu"),
    "gelu": lambda tracing, node, source: tracing.gelu(node.name, source, node.kwargs.get("approximate", "none")),
    "leaky_relu": _leaky,
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "max_pool1d": _pool(1, linear=False),
    "max_pool2d": _pool(2, linear=False),
    "adaptive_max_pool1d": _pool(1, linear=False),
    "adaptive_max_pool2d": _pool(2, linear=False),
    "avg_pool1d": _pool(1, linear=True),
    "avg_pool2d": _pool(2, linear=True),
    "adaptive_avg_pool1d": _pool(1, linear=True),
    "adaptive_avg_pool2d": _pool(2, linear=True),
    "dropout": _dropout,
    "getitem": _slice,
    "contiguous": lambda tracing, node, source: source,
}
