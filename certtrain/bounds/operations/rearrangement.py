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
from .options import kept_batch, options, refuse, several
from .registry import BatchSize, Constant, Tracing, from_function, from_module


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

    def entries(self, *numbers: Tensor) -> Tensor | None:
        return self.function(*numbers)

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
    """Entries selected by index, in any order, each as often as there are entries at most."""

    entrywise_map: ClassVar[bool] = False


@dataclass(frozen=True, eq=False)
class Copies(Selection):
    """Entries selected by index, in any order, as often as wanted."""

    def terms(self, shape: torch.Size) -> int:
        """The adjoint adds up an entry's copies, at most all of the output."""
        return max(shape.numel(), self.function(torch.zeros(1, *shape)).numel()) + 1


@from_module(nn.Flatten)
def _flatten_module(tracing: Tracing, path: str, source: int, module: nn.Flatten) -> int | None:
    if module.start_dim == 0:
        return None
    return tracing.append(Rearrangement(path, (source,), _flattening(path, module.start_dim, module.end_dim)))


def _flattening(path: str, start: Any, end: Any) -> Callable[[Tensor], Tensor]:
    """``x.flatten(start, end)``, which has to keep the batch dimension."""

    def flatten(x: Tensor) -> Tensor:
        if not isinstance(start, int) or start == 0 or start == -x.ndim:
            raise UnsupportedOperation(
                f"flatten at {path!r}: found start_dim={start}; accepted: 1 or more (keeps the batch)"
            )
        return x.flatten(start, end)

    return flatten


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
    sizes = several(tracing, node, "shape", "size")
    keeps_batch = sizes and (isinstance(sizes[0], BatchSize) or (sizes[0] == -1 and -1 not in sizes[1:]))
    rest = [size for size in sizes[1:] if type(size) is int]
    if not keeps_batch or len(rest) != len(sizes) - 1 or rest.count(-1) > 1:
        refuse(node, f"sizes {tuple(sizes)}", "x.size(0) or -1 first, then numbers")

    def apply(x: Tensor) -> Tensor:
        # with an empty batch -1 is ambiguous: work it out from the other entries
        known = math.prod(size for size in rest if size != -1)
        return x.reshape(x.shape[0], *(math.prod(x.shape[1:]) // known if size == -1 else size for size in rest))

    return tracing.append(Rearrangement(node.name, (source,), apply))


@from_function("flatten")
def _flatten(tracing: Tracing, node: fx.Node, source: int) -> int:
    start, end = options(tracing, node, start_dim=0, end_dim=-1)
    if start == 0:
        refuse(node, "start_dim=0", "1 or more (keeps the batch)")
    return tracing.append(Rearrangement(node.name, (source,), _flattening(node.name, start, end)))


@from_function("getitem")
def _indexed(tracing: Tracing, node: fx.Node, source: int) -> int:
    index: Any = node.args[1]
    parts = index if is_tuple(index) else (index,)
    ends = [end for part in parts if is_slice(part) for end in (part.start, part.stop, part.step)]
    known = [tracing.values.get(part) for part in parts if isinstance(part, fx.Node)]
    buffer = known[0] if len(known) == 1 and isinstance(known[0], Constant) else None  # of places
    plain = all(
        is_slice(part)
        or part is None
        or part is Ellipsis
        or type(part) is int
        or (buffer and isinstance(part, fx.Node))
        for part in parts
    )
    if parts[:1] not in ((slice(None),), (Ellipsis,)) or not plain or any(isinstance(end, fx.Node) for end in ends):
        raise UnsupportedOperation(
            f"{node.name!r}: found x[{index}]; accepted: x[:, …] with slices, numbers, None and a buffer of "
            "numbers, the batch whole"
        )

    def pick(x: Tensor) -> Tensor:
        if parts[0] is Ellipsis and len([part for part in parts[1:] if part is not None]) >= x.ndim:
            refuse(node, f"x[{index}] of {x.ndim} dimensions", "x[:, …], the batch whole")
        places = tuple(buffer.value().to(x.device) if buffer and isinstance(part, fx.Node) else part for part in parts)
        return kept_batch(node, x, x[places])

    return tracing.append((Copies if buffer else Rearrangement)(node.name, (source,), pick))
