"""Scaled dot product attention, softmax(q k^T / sqrt(E)) v, spelled out in operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .base import UnsupportedOperation
from .matrix_product import MatrixProduct
from .pooling import AveragePool
from .rearrangement import Selection
from .registry import Tracing, from_function
from .rows import Along
from .scale import Scale
from .softmax import Softmax

NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True, eq=False)
class ByRoot(AveragePool):
    """A value divided by the root of its last dimension's size."""

    def roundings(self, shape: torch.Size) -> int:
        return 2

    def terms(self, shape: torch.Size) -> int:
        return 1


def _by_root(x: Tensor) -> Tensor:
    return x * x.shape[-1] ** -0.5


def _transposed(x: Tensor) -> Tensor:
    return x.mT


@from_function("scaled_dot_product_attention")
def _attention(tracing: Tracing, node: fx.Node, source: int) -> int:
    given: dict[str, Any] = {**dict(zip(NAMES, node.args)), **node.kwargs}
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
    wrong = [f"{name}={given[name]}" for name, value in defaults.items() if given.get(name, value) != value]
    if wrong or isinstance(given.get("scale"), fx.Node):
        raise UnsupportedOperation(
            f"scaled_dot_product_attention at {node.name!r}: found {', '.join(wrong) or 'a computed scale'}; accepted: "
            "query, key, value and scale alone"
        )
    query, key, value = (tracing.position(node, given.get(name)) for name in NAMES[:3])
    scale: float | None = given.get("scale")
    if scale is None:
        query = tracing.append(ByRoot(node.name, (query,), _by_root))
    else:
        query = tracing.append(Scale(node.name, (query,), lambda: (float(scale), 0.0)))
    key = tracing.append(Selection(node.name, (key,), _transposed))
    scores = tracing.append(MatrixProduct(node.name, (query, key)))
    shares = tracing.append(Softmax(node.name, (scores,), Along(-1, node.name)))
    return tracing.append(MatrixProduct(node.name, (shares, value)))
