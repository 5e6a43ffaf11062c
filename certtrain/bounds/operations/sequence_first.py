"""Values whose batch is dimension 1, as torch's transformer modules take them by default.

They are held with the batch first. What leaves the batch in its place is done to them as they are held; the rest is
refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from .base import UnsupportedOperation
from .dropout import Dropout
from .entrywise import Entrywise
from .means import Reduction
from .options import OTHER_WAY, options, refuse, several
from .rearrangement import Rearrangement, Selection
from .registry import FUNCTIONS, Tracing
from .sum import Sum

ALONG_FEATURES = (nn.Linear, nn.LayerNorm, nn.Identity)
"""Modules that do the same to values held in either order, if they read the last dimension alone."""
ACCEPTED = (
    "encoders and attention with batch_first=False, linear layers, layer norms of the last dimension, activations, "
    "sums, x[number], x.mean(0), and transposing it back"
)


@dataclass(frozen=True, eq=False)
class SequenceFirst:
    """A value (L, B, …), held at ``position`` as (B, L, …).

    Args:
        moved_by: the step that moved its batch.
    """

    position: int
    moved_by: str

    def holding(self, position: int) -> SequenceFirst:
        """Another value, moved by the same step."""
        return replace(self, position=position)

    @property
    def words(self) -> str:
        return f"a value whose batch is dimension 1 since {self.moved_by!r}"


def moved(tracing: Tracing, node: fx.Node, name: str, position: int) -> SequenceFirst | None:
    """The value that a permutation of a computed value gives, if that makes the batch dimension 1; else None."""
    order = _order(tracing, node, name)
    if order is None or order[1] != 0:
        return None
    return SequenceFirst(_permuted(tracing, node, position, [0, order[0], *order[2:]]), node.name)


def _order(tracing: Tracing, node: fx.Node, name: str) -> list[int] | None:
    """The dimensions' new order, or its beginning; None if the function does not permute them or moves others."""
    if name == "permute":
        dims = several(tracing, node, "dims")
        return dims if len(dims) > 1 and all(type(dim) is int and dim >= 0 for dim in dims) else None
    if name in ("transpose", "swapaxes", "swapdims") and not node.kwargs and set(node.args[1:]) == {0, 1}:
        return [1, 0]
    return None


def _permuted(tracing: Tracing, node: fx.Node, position: int, order: list[int]) -> int:
    if order == list(range(len(order))):
        return position

    return tracing.append(Selection(node.name, (position,), lambda x: x.permute(*order)))


def function(tracing: Tracing, node: fx.Node, name: str, value: SequenceFirst) -> Any:
    """The rule of functions of such a value."""
    order = _order(tracing, node, name)
    if order is not None:
        held = [{0: 1, 1: 0}.get(dim, dim) for dim in order]
        if held[0] == 0:
            return _permuted(tracing, node, value.position, held)
    if name == "getitem" and type(index := node.args[1]) is int:
        return tracing.append(Rearrangement(node.name, (value.position,), lambda x: x[:, index]))
    if name == "mean":
        dim, keepdim, _ = options(tracing, node, dim=None, keepdim=False, dtype=None)
        if dim in (0, [0], (0,)) and not keepdim:
            return tracing.append(
                Reduction(node.name, (value.position,), lambda x: x.mean(1), lambda shape: shape[0])
            )  # fmt: skip
    if name in ("add", "iadd") and len(node.args) == 2 and not node.kwargs:
        other = tracing.values.get(node.args[1]) if isinstance(node.args[1], fx.Node) else None
        if isinstance(other, SequenceFirst):
            return value.holding(tracing.append(Sum(node.name, (value.position, other.position))))
    if name in FUNCTIONS:
        before = len(tracing.operations)
        found = FUNCTIONS[name](tracing, node, value.position)
        if found == value.position or _is_one_entrywise(tracing, before, name == "dropout"):
            return value.holding(found)
    refuse(node, value.words, ACCEPTED)


def _is_one_entrywise(tracing: Tracing, before: int, drops: bool) -> bool:
    """Whether a single operation was appended, and does the same to every entry."""
    appended = tracing.operations[before:]
    return len(appended) == 1 and isinstance(appended[0], (Entrywise, Dropout) if drops else Entrywise)


def module(tracing: Tracing, path: str, value: SequenceFirst, layer: nn.Module) -> SequenceFirst:
    """The rule of modules of such a value alone."""
    if isinstance(layer, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        tracing.sequence_first = True
        try:
            return value.holding(tracing.module(path, value.position, layer))
        finally:
            tracing.sequence_first = False
    along = isinstance(layer, ALONG_FEATURES) and len(getattr(layer, "normalized_shape", (0,))) == 1
    before, found = len(tracing.operations), tracing.module(path, value.position, layer)
    if along or found == value.position or _is_one_entrywise(tracing, before, type(layer) is nn.Dropout):
        return value.holding(found)
    raise UnsupportedOperation(
        f"{type(layer).__name__} at {path!r}: found {value.words}; accepted: {ACCEPTED}; {OTHER_WAY}"
    )
