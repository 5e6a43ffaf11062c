"""Rearrangements of entries: reshapes, slices, padding, shuffled channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ...typed import is_slice, is_tuple
from ..interval import Interval
from ..relaxation import InputLines, Relaxation
from .base import Function, LinearOperation, UnsupportedOperation
from .registry import BatchSize, Tracing, from_function, from_module


@dataclass(frozen=True, eq=False)
class Rearrangement(LinearOperation):
    """A linear map without constant, of which each output is one of its inputs, in their order, or 0."""

    function: Callable[[Tensor], Tensor]

    entrywise_map: ClassVar[bool] = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def interval(self, x: Interval) -> Interval:
        return x.map(self.function)

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        (shape,) = shapes
        with torch.enable_grad():
            point = forms.new_zeros(forms.shape[0] * forms.shape[1], *shape, requires_grad=True)
            (adjoint,) = torch.autograd.grad(
                self.function(point), point, forms.flatten(0, 1), create_graph=forms.requires_grad
            )
        return (adjoint.reshape(*forms.shape[:2], *shape),)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        return inputs[0].map(self.function)

    def magnitude(self, x: Tensor) -> Tensor:
        return self.function(x).abs()

    def roundings(self, shape: torch.Size) -> int:
        return 0

    def terms(self, shape: torch.Size) -> int:
        return shape.numel() + 1

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self.function)


@dataclass(frozen=True, eq=False)
class Selection(Rearrangement):
    """Entries selected by index, in any order."""

    entrywise_map: ClassVar[bool] = False


@from_module(nn.Flatten)
def _flatten_module(tracing: Tracing, path: str, source: int, module: nn.Flatten) -> int | None:
    return tracing.append(Rearrangement(path, (source,), module)) if module.start_dim >= 1 else None


@from_module(nn.ChannelShuffle)
def _shuffle(tracing: Tracing, path: str, source: int, module: nn.ChannelShuffle) -> int | None:
    if tracing.operations[source].entrywise_map:
        return None
    return tracing.append(Selection(path, (source,), module))


@from_module(nn.Identity)
def _identity(tracing: Tracing, path: str, source: int, module: nn.Identity) -> int:
    return source


@from_function("view", "reshape")
def _reshape(tracing: Tracing, node: fx.Node, source: int) -> int:
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    values = [tracing.values.get(size) if isinstance(size, fx.Node) else size for size in sizes]
    keeps_batch = values and (isinstance(values[0], BatchSize) or (values[0] == -1 and -1 not in values[1:]))
    rest = [value for value in values[1:] if type(value) is int and not isinstance(value, fx.Node)]
    if not keeps_batch or len(rest) != len(values) - 1 or any(isinstance(size, fx.Node) for size in sizes[1:]):
        raise UnsupportedOperation(
            f"{node.target} at {node.name!r}: found sizes {tuple(sizes)}; accepted: x.size(0) or -1 first, then numbers"
        )

    def apply(x: Tensor) -> Tensor:
        # with an empty batch -1 is ambiguous: work it out from the other entries
        known = math.prod(size for size in rest if size != -1)
        return x.reshape(x.shape[0], *(math.prod(x.shape[1:]) // known if size == -1 else size for size in rest))

    return tracing.append(Rearrangement(node.name, (source,), apply))


@from_function("flatten")
def _flatten(tracing: Tracing, node: fx.Node, source: int) -> int:
    start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
    end: Any = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
    if not isinstance(start, int) or start < 1:
        raise UnsupportedOperation(
            f"flatten at {node.name!r}: found start_dim={start}; accepted: 1 or more (keeps the batch)"
        )
    return tracing.append(Rearrangement(node.name, (source,), lambda x: x.flatten(start, end)))


@from_function("getitem")
def _slice(tracing: Tracing, node: fx.Node, source: int) -> int:
    index: Any = node.args[1]
    parts = index if is_tuple(index) else (index,)
    ends = [end for part in parts if is_slice(part) for end in (part.start, part.stop, part.step)]
    numbers = len(ends) == 3 * len(parts) and all(end is None or type(end) is int for end in ends)
    if not numbers or parts[:1] != (slice(None),):
        raise UnsupportedOperation(
            f"{node.name!r}: found x[{index}]; accepted: x[:, a:b, …] with numbers, the batch whole"
        )
    return tracing.append(Rearrangement(node.name, (source,), lambda x: x[parts]))


@from_function("contiguous")
def _contiguous(tracing: Tracing, node: fx.Node, source: int) -> int:
    return source
