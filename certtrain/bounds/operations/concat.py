"""Concatenation of values along a dimension, constants among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..interval import Interval
from ..relaxation import InputLines, Relaxation
from ..window import Window
from .base import Folding, Function, Graph, LinearOperation, UnsupportedOperation, alike
from .options import behind_batch
from .rearrangement import Rearrangement
from .registry import Constant, Tracing


@dataclass(frozen=True, eq=False)
class Concat(LinearOperation):
    """The inputs concatenated along ``dim`` as in ``torch.cat``: the batch is 0, negative ones count from the end."""

    dim: int

    def along(self, rank: int) -> int:
        """``dim`` as a non-negative number, for tensors with ``rank`` dimensions.

        Raises:
            UnsupportedOperation: it is the batch dimension, or out of range.
        """
        return _along(self.path, self.dim, rank)

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

    def entries(self, *numbers: Tensor) -> Tensor:
        return self(*numbers)

    def change(self, other: Any, graph: Graph, values: Sequence[int], changes: Sequence[int | None]) -> int | None:
        if not alike(self, other):
            return super().change(other, graph, values, changes)
        if all(d is None for d in changes):
            return None
        parts = [graph.zeros(value) if d is None else d for value, d in zip(values, changes, strict=True)]
        return graph.append(Concat(self.path, tuple(parts), self.dim))

    def magnitude(self, *parts: Tensor) -> Tensor:
        return self(*parts)

    def roundings(self, shape: torch.Size) -> int:
        return 0

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        return window if self.along(len(shapes[0]) + 1) == 1 else None

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(lambda *parts: self(*parts))


def _along(path: str, dim: int, rank: int) -> int:
    place = dim + rank if dim < 0 else dim
    if not 1 <= place < rank:
        raise UnsupportedOperation(
            f"cat at {path!r}: found dim={dim} of {rank} dimensions; accepted: one behind the batch"
        )
    return place


@dataclass(frozen=True, eq=False)
class Bordered(LinearOperation):
    """The input with constants before and behind it along ``dim``, such as a class token; as in ``torch.cat``.

    Args:
        before, behind: look up constants (1, …) or None, at each use.
    """

    dim: int
    before: Callable[[], Tensor | None]
    behind: Callable[[], Tensor | None]

    def _joined(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``x`` with functions of the constants around it."""
        dim, parts = _along(self.path, self.dim, x.ndim), [x]
        for place, constant in ((0, self.before()), (2, self.behind())):
            if constant is not None:
                if constant.shape[0] != 1:
                    raise UnsupportedOperation(
                        f"cat at {self.path!r}: found a constant of shape {tuple(constant.shape)}; accepted: one row, "
                        "expanded to the batch's size, or a computed value"
                    )
                sizes = [constant.shape[dim] if number == dim else -1 for number in range(x.ndim)]
                part = function(constant).to(x).expand(x.shape[0], *sizes[1:])
                parts.insert(place if place == 0 else len(parts), part)
        return torch.cat(parts, dim)

    def __call__(self, x: Tensor) -> Tensor:
        return self._joined(x, lambda constant: constant)

    def interval(self, x: Interval) -> Interval:
        return Interval(self(x.center), self._joined(x.radius, torch.zeros_like))

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        (shape,) = shapes
        dim, before = _along(self.path, self.dim, 1 + len(shape)), self.before()
        return (forms.narrow(dim + 1, 0 if before is None else before.shape[dim], shape[dim - 1]),)

    def constant(self, forms: Tensor) -> Tensor:
        dim = _along(self.path, self.dim, forms.ndim - 1)
        sides = sum(0 if constant is None else constant.shape[dim] for constant in (self.before(), self.behind()))
        inside = forms[:1, 0].narrow(dim, 0, forms.shape[dim + 1] - sides)
        return (forms * self(torch.zeros_like(inside))).flatten(2).sum(-1)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        def around(x: Tensor) -> Tensor:
            joined = self._joined(x.flatten(0, 1), torch.zeros_like)
            return joined.reshape(*x.shape[:2], *joined.shape[1:])

        (x,) = inputs
        lines = InputLines(around(x.lower), around(x.upper))
        return lines.shifted(self(torch.zeros_like(x.lower[:1, -1])))

    def magnitude(self, x: Tensor) -> Tensor:
        return self._joined(x, torch.abs)

    def roundings(self, shape: torch.Size) -> int:
        return 0

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)

    def fold(self, folding: Folding, *sources: int) -> int:
        ends = [None if end is None else folding.tensor(end, self.path) for end in (self.before(), self.behind())]
        return folding.append(replace(self, inputs=sources, before=lambda: ends[0], behind=lambda: ends[1]))


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
    if any(isinstance(tracing.values.get(part), Constant) for part in parts if isinstance(part, fx.Node)):
        positions = _bordered(tracing, node, parts, dim)
        return positions[0] if len(positions) == 1 else tracing.append(Concat(node.name, tuple(positions), dim))
    return tracing.append(Concat(node.name, tuple(tracing.position(node, part) for part in parts), dim))


def _bordered(tracing: Tracing, node: fx.Node, parts: Sequence[Any], dim: int) -> list[int]:
    """The positions of the computed parts, each with the constants that stand before it, the last with those behind."""
    constants: list[Constant] = []
    found: list[tuple[int, list[Constant]]] = []
    for part in parts:
        value = tracing.values.get(part) if isinstance(part, fx.Node) else None
        if isinstance(value, Constant):
            constants.append(value)
        else:
            found.append((tracing.position(node, part), constants))
            constants = []
    if not found:
        raise UnsupportedOperation(
            f"cat at {node.name!r}: found constants alone; accepted: a computed value among them"
        )

    def joined(some: list[Constant]) -> Callable[[], Tensor | None]:
        return lambda: torch.cat([one.value() for one in some], dim) if some else None

    last, positions = len(found) - 1, list[int]()
    for number, (position, before) in enumerate(found):
        behind = constants if number == last else []
        if before or behind:
            position = tracing.append(Bordered(node.name, (position,), dim, joined(before), joined(behind)))
        positions.append(position)
    return positions


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
