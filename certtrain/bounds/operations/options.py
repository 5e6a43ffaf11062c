"""Arguments of functions in a model's forward, for tracing rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from ...typed import is_list, is_tuple
from .base import UnsupportedOperation
from .registry import BatchSize, Tracing

OTHER_WAY = "or an ONNX file of the model (export_onnx, then read_onnx)"
"""A way for forwards that cannot be traced, for messages."""
REQUIRED = object()
"""Default of an option that has to be given."""


def options(tracing: Tracing, node: fx.Node, **defaults: Any) -> list[Any]:
    """The arguments of a function behind its first operand, in the order of ``defaults``.

    Raises:
        UnsupportedOperation: an unknown or missing option, or one that is computed from the images' values.
    """
    names, given = list(defaults), dict(node.kwargs)
    first = 1 if node.args else 0
    given.pop("input", None)
    positional = [name for name in names if not name.startswith("_")]
    if len(node.args) - first > len(positional) or given.keys() - defaults.keys():
        refuse(node, f"options {[*node.args[first:], *given]}", ", ".join(names) or "none")
    given |= dict(zip(positional, node.args[first:]))
    found = {name: number(tracing, node, value) for name, value in given.items()}
    missing = [name for name, default in defaults.items() if default is REQUIRED and name not in found]
    if missing:
        refuse(node, f"no {missing[0]}", ", ".join(names))
    return [found.get(name, default) for name, default in defaults.items()]


def several(tracing: Tracing, node: fx.Node, *names: str) -> list[Any]:
    """The numbers of a function that takes them one by one or as one list, under any of these names."""
    keywords = {name: value for name, value in node.kwargs.items() if name != "input"}
    values: Any = node.args[1:] if node.args else ()
    if len(keywords) == 1 and keywords.keys() <= set(names) and not values:
        (values,) = keywords.values()
    elif keywords:
        refuse(node, f"options {list(keywords)}", ", ".join(names))
    elif len(values) == 1 and (is_tuple(values[0]) or is_list(values[0])):
        values = values[0]
    found: list[Any] = [*values] if is_tuple(values) or is_list(values) else [values]
    return [number(tracing, node, value) for value in found]


def number(tracing: Tracing, node: fx.Node, value: Any) -> Any:
    """An argument as it is; steps of the graph that give the batch's size are replaced by its placeholder."""
    if is_tuple(value):
        return tuple(number(tracing, node, one) for one in value)
    if is_list(value):
        return [number(tracing, node, one) for one in value]
    if not isinstance(value, fx.Node):
        return value
    known = tracing.values.get(value)
    if not isinstance(known, BatchSize):
        refuse(node, f"an option {value.name!r} that is a tensor", "numbers")
    return known


def beyond_batch(node: fx.Node, dims: Any, rank: int) -> list[int]:
    """Dimensions as non-negative numbers, for tensors with ``rank`` dimensions.

    Raises:
        UnsupportedOperation: the batch dimension is among them, or one is out of range.
    """
    counted = [dims] if isinstance(dims, int) else list(dims)
    found = [dim + rank if dim < 0 else dim for dim in counted]
    if any(not 1 <= dim < rank for dim in found):
        refuse(node, f"dimensions {counted} of {rank}", "those behind the batch's, which is 0")
    return found


@dataclass(frozen=True)
class Dimensions:
    """Dimensions of values (B, *shape), without the batch's.

    Args:
        node: the function's call, for errors.
        dims: as in torch, negative ones from the end.
    """

    node: fx.Node
    dims: Any

    def of(self, rank: int) -> tuple[int, ...]:
        """They as numbers >= 1 in order, for values with ``rank`` dimensions.

        Raises:
            UnsupportedOperation: the batch is among them, or they are out of range.
        """
        return tuple(sorted(set(beyond_batch(self.node, self.dims, rank))))

    def last(self, x: Tensor) -> Tensor:
        """``x`` with these dimensions joined, as the last one."""
        gone = self.of(x.ndim)
        kept = [number for number in range(x.ndim) if number not in gone]
        return x.permute(*kept, *gone).flatten(len(kept))

    def back(self, x: Tensor) -> Tensor:
        """Reductions of ``last``, (…, 1), with these dimensions of size 1 in their places."""
        x = x.squeeze(-1)
        for number in self.of(x.ndim + (1 if isinstance(self.dims, int) else len(set(self.dims)))):
            x = x.unsqueeze(number)
        return x

    def squeezed(self, x: Tensor) -> Tensor:
        """``x`` without these dimensions, which have size 1."""
        return x.squeeze(self.of(x.ndim))

    def count(self, shape: torch.Size) -> int:
        """The number of entries of one place over these dimensions, for values (B, *shape)."""
        return torch.Size(shape[number - 1] for number in self.of(1 + len(shape))).numel()


def dimensions(tracing: Tracing, node: fx.Node) -> tuple[Dimensions, bool]:
    """(dimensions, whether they stay with size 1): the arguments of a function that reduces.

    Raises:
        UnsupportedOperation: no dimensions, so that the batch would be reduced, too; or a dtype.
    """
    dims, keepdim, dtype, axis = options(tracing, node, dim=None, keepdim=False, dtype=None, axis=None)
    dims = axis if dims is None else dims
    if dims is None or dims == () or dims == [] or dtype is not None:
        found = "all dimensions" if dtype is None else f"dtype={dtype}"
        refuse(node, found, "dim, which numbers dimensions behind the batch's, and keepdim")
    return Dimensions(node, dims), bool(keepdim)


def behind_batch(node: fx.Node, dim: Any, rank: int) -> int:
    """``beyond_batch`` of a single dimension."""
    (found,) = beyond_batch(node, dim, rank)
    return found


def kept_batch(node: fx.Node, x: Tensor, y: Tensor) -> Tensor:
    """``y``, which has to have one row for each row of ``x``."""
    if not y.ndim or y.shape[0] != x.shape[0]:
        refuse(node, f"shape {tuple(y.shape)} from {tuple(x.shape)}", "a function that keeps the batch dimension, 0")
    return y


def refuse(node: fx.Node, found: str, accepted: str) -> NoReturn:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    raise UnsupportedOperation(f"{target} at {node.name!r}: found {found}; accepted: {accepted}; {OTHER_WAY}")
