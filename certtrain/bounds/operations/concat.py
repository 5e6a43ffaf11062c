"""Concatenation of values along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..interval import Interval
from ..relaxation import InputLines, Relaxation
from ..window import Window
from .base import Function, LinearOperation, UnsupportedOperation
from .options import behind_batch
from .rearrangement import Rearrangement
from .registry import Tracing


@dataclass(frozen=True, eq=False)
class Concat(LinearOperation):
    """The inputs concatenated along ``dim`` as in ``torch.cat``: the batch is 0, negative ones count from the end."""

    dim: int

    def along(self, rank: int) -> int:
        """``dim`` as a non-negative number, for tensors with ``rank`` dimensions.

        Raises:
            UnsupportedOperation: it is the batch dimension, or out of range.
        """
        dim = self.dim + rank if self.dim < 0 else self.dim
        if not 1 <= dim < rank:
            raise UnsupportedOperation(
                f"cat at {self.path!r}: found dim={self.dim} of {rank} dimensions; accepted: one behind the batch"
            )
        return dim

    def __call__(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, self.along(parts[0].ndim))

    def interval(self, *parts: Interval) -> Interval:
        return Interval(self(*(x.center for x in parts)), self(*(x.radius for x in parts)))

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        dim = self.along(len(shapes[0]) + 1)
        return torch.split(forms, [shape[dim - 1] for shape in shapes], dim + 1)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        dim = self.along(inputs[0].lower.ndim - 1) + 1
        return InputLines(torch.cat([x.lower for x in inputs], dim), torch.cat([x.upper for x in inputs], dim))

    def magnitude(self, *parts: Tensor) -> Tensor:
        return self(*parts)

    def roundings(self, shape: torch.Size) -> int:
        return 0

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        return window if self.along(len(shapes[0]) + 1) == 1 else None

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(lambda *parts: self(*parts))


def concat(tracing: Tracing, node: fx.Node) -> int:
    """Tracing rule of ``torch.cat``, whose first argument is a list."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, (list, tuple)) or not parts:
        raise UnsupportedOperation(f"cat at {node.name!r}: found {parts}; accepted: a list of values")
    if type(dim) is not int or dim == 0 or set(node.kwargs) - {"tensors", "dim"}:
        found = ", ".join([f"dim={dim}", *(name for name in node.kwargs if name not in ("tensors", "dim"))])
        raise UnsupportedOperation(
            f"cat at {node.name!r}: found {found}; accepted: a dimension other than the batch's, 0"
        )
    return tracing.append(Concat(node.name, tuple(tracing.position(node, part) for part in parts), dim))


def stack(tracing: Tracing, node: fx.Node) -> int:
    """Tracing rule of ``torch.stack``: its parts with a new dimension, concatenated along it."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, (list, tuple)) or not parts or type(dim) is not int or dim == 0:
        raise UnsupportedOperation(
            f"stack at {node.name!r}: found {parts}, dim={dim}; accepted: a list of values, dim behind the batch's"
        )

    def widen(x: Tensor) -> Tensor:
        return x.unsqueeze(behind_batch(node, dim, x.ndim + 1))

    rows = [tracing.append(Rearrangement(node.name, (tracing.position(node, part),), widen)) for part in parts]
    return tracing.append(Concat(node.name, tuple(rows), dim))
