"""Multi-head attention and transformer encoders as torch's modules compute them, spelled out in operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...typed import forward_pre_hooks
from ..wrappers import computed
from .attention import shares
from .base import UnsupportedOperation
from .dropout import Dropout, Following
from .gated import Gelu
from .linear import Dense
from .matrix_product import MatrixProduct
from .means import Reduction
from .rearrangement import Selection
from .registry import Several, Tracing, arguments, from_call, from_module
from .relu import Relu
from .sequence_first import SequenceFirst
from .sum import Sum

NO_MASKS: dict[str, Any] = {"key_padding_mask": None, "attn_mask": None, "is_causal": False}
ACTIVATIONS: dict[Any, type[Relu] | type[Gelu]] = {F.relu: Relu, torch.relu: Relu, F.gelu: Gelu}
"""Functions that an encoder layer takes for its activation."""


@dataclass(frozen=True, eq=False)
class Projection:
    """The weights by which attention forms queries (0), keys (1) or values (2), looked up at each use."""

    attention: nn.MultiheadAttention
    part: int

    @property
    def weight(self) -> Tensor:
        owner: Any = self.attention
        width = self.attention.embed_dim
        if owner.in_proj_weight is not None:
            return owner.in_proj_weight[self.part * width : (self.part + 1) * width]
        return (owner.q_proj_weight, owner.k_proj_weight, owner.v_proj_weight)[self.part]

    @property
    def bias(self) -> Tensor | None:
        owner: Any = self.attention
        bias, width = owner.in_proj_bias, self.attention.embed_dim
        return None if bias is None else bias[self.part * width : (self.part + 1) * width]


def _heads(path: str, count: int) -> Callable[[Tensor], Tensor]:
    """(B, L, E) → (B, heads, L, E / heads)."""

    def apart(x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise UnsupportedOperation(
                f"MultiheadAttention at {path!r}: found {x.ndim} dimensions; accepted: (B, tokens, features)"
            )
        return torch.unflatten(x, -1, (count, -1)).transpose(1, 2)

    return apart


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(
    tracing: Tracing, path: str, attention: nn.MultiheadAttention, query: int, key: int, value: int
) -> tuple[int, int]:
    """Append multi-head attention to values (B, L, E), (B, S, E) and (B, S, E).

    Returns:
        The positions of the output (B, L, E) and of the shares (B, heads, L, S).
    """
    if attention.bias_k is not None or attention.add_zero_attn:
        found = "add_zero_attn" if attention.add_zero_attn else "add_bias_kv"
        raise UnsupportedOperation(f"MultiheadAttention at {path!r}: found {found}=True; accepted: False")
    if attention.batch_first == tracing.sequence_first:
        place = "1" if tracing.sequence_first else "0"
        raise UnsupportedOperation(
            f"MultiheadAttention at {path!r}: found batch_first={attention.batch_first} and the batch as dimension "
            f"{place}; accepted: both alike"
        )
    if computed(attention) or forward_pre_hooks(attention.out_proj):
        raise UnsupportedOperation(
            f"MultiheadAttention at {path!r}: found a weight that a hook computes; accepted: "
            "torch.nn.utils.parametrizations"
        )
    heads: int = attention.num_heads
    apart = _heads(path, heads)
    parts: list[int] = []
    for number, source in enumerate((query, key, value)):
        projected = tracing.append(Dense(path, (source,), Projection(attention, number)))
        parts.append(tracing.append(Selection(path, (projected,), apart)))
    share = shares(tracing, path, parts[0], parts[1])
    if attention.dropout:
        share = tracing.append(Dropout(path, (share,), Following(F.dropout, attention.dropout, attention)))
    mixed = tracing.append(MatrixProduct(path, (share, parts[2])))
    joined = tracing.append(Selection(path, (mixed,), _joined))
    return tracing.append(Dense(f"{path}.out_proj", (joined,), attention.out_proj)), share


@from_call(nn.MultiheadAttention)
def _attention(tracing: Tracing, node: fx.Node, path: str, module: nn.MultiheadAttention) -> Several:
    given = arguments(node, module)
    wrong = [f"{name}={given[name]}" for name, value in NO_MASKS.items() if given.get(name, value) != value]
    if wrong:
        raise UnsupportedOperation(
            f"MultiheadAttention at {path!r}: found {', '.join(wrong)}; accepted: query, key and value without masks"
        )
    parts = [given.get(name) for name in ("query", "key", "value")]
    values = [tracing.values.get(part) if isinstance(part, fx.Node) else None for part in parts]
    held = [value for value in values if isinstance(value, SequenceFirst)]
    moved = held[0] if len(held) == len(values) else None
    sources = [value.position for value in held] if moved else [tracing.position(node, part) for part in parts]
    tracing.sequence_first = moved is not None
    try:
        output, share = attend(tracing, path, module, *sources)
    finally:
        tracing.sequence_first = False

    def weights() -> int:
        if given.get("need_weights", True) is not True:
            raise UnsupportedOperation(f"MultiheadAttention at {path!r}: found its weights read; accepted: the output")
        if given.get("average_attn_weights", True) is not True:
            return share
        return tracing.append(Reduction(path, (share,), lambda x: x.mean(1), lambda shape: shape[0]))

    return Several((lambda: output if moved is None else moved.holding(output), weights))


def _is_torchs(module: Any, kind: type[nn.Module]) -> bool:
    """Whether torch's fast path, which reads the weights alone, computes what the module's forward does."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _activated(tracing: Tracing, path: str, source: int, layer: nn.TransformerEncoderLayer) -> int:
    """Append an encoder layer's activation.

    Where no gradients are kept torch goes by a number that was set when the layer was made, and knows GELU by the error
    function alone.
    """
    activation: Any = layer.activation
    kind = ACTIVATIONS.get(activation) if not isinstance(activation, nn.Module) else None
    fast = {1: nn.ReLU, 2: nn.GELU}.get(layer.activation_relu_or_gelu)
    alike = {1: kind is Relu, 2: kind is Gelu}.get(layer.activation_relu_or_gelu, True)
    if isinstance(activation, nn.Module):
        alike = fast is None or (_is_torchs(activation, fast) and getattr(activation, "approximate", "none") == "none")
    if not alike or (kind is None and not isinstance(activation, nn.Module)):
        name = getattr(activation, "__name__", repr(activation))
        raise UnsupportedOperation(
            f"TransformerEncoderLayer at {path!r}: found the activation {name}, which torch does not know or replaces "
            "by another where no gradients are kept; accepted: relu, gelu, or a module, given when the layer is made"
        )
    if kind is None:
        return tracing.module(f"{path}.activation", source, activation)
    return tracing.append(kind(f"{path}.activation", (source,)))


@from_module(nn.TransformerEncoderLayer)
def _encoder_layer(tracing: Tracing, path: str, source: int, module: nn.TransformerEncoderLayer) -> int | None:
    if type(module).forward is not nn.TransformerEncoderLayer.forward:
        return None
    kinds = {"norm": nn.LayerNorm, "linear": nn.Linear, "self_attn": nn.MultiheadAttention}
    for name in ("norm1", "norm2", "linear1", "linear2", "self_attn"):
        kind = kinds[name.rstrip("12")]
        if not _is_torchs(getattr(module, name), kind):
            found = type(getattr(module, name)).__name__
            raise UnsupportedOperation(
                f"TransformerEncoderLayer at {path!r}: found {name} of class {found}; accepted: {kind.__name__}"
            )

    def through(x: int, *names: str) -> int:
        for name in names:
            x = tracing.module(f"{path}.{name}", x, getattr(module, name))
        return x

    def attended(x: int) -> int:
        return through(attend(tracing, f"{path}.self_attn", module.self_attn, x, x, x)[0], "dropout1")

    def fed(x: int) -> int:
        return through(_activated(tracing, path, through(x, "linear1"), module), "dropout", "linear2", "dropout2")

    def added(x: int, y: int) -> int:
        return tracing.append(Sum(path, (x, y)))

    if module.norm_first:
        source = added(source, attended(through(source, "norm1")))
        return added(source, fed(through(source, "norm2")))
    source = through(added(source, attended(source)), "norm1")
    return through(added(source, fed(source)), "norm2")


@from_module(nn.TransformerEncoder)
def _encoder(tracing: Tracing, path: str, source: int, module: nn.TransformerEncoder) -> int:
    for number, layer in enumerate(module.layers):
        source = tracing.module(f"{path}.layers.{number}", source, layer)
    return source if module.norm is None else tracing.module(f"{path}.norm", source, module.norm)
