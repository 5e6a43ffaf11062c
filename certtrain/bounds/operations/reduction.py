"""Sums, means, maxima and minima over dimensions, and the larger or smaller of two values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...typed import broadcast_shape, is_integers
from ..interval import Interval
from ..window import Window
from .base import Folding, Function, Unbounded, UnsupportedOperation
from .pooling import AveragePool, MaxPool
from .rearrangement import Rearrangement, Selection
from .registry import Tracing, from_function
from .relu import Relu
from .scale import Scale
from .sum import Sum


@dataclass(frozen=True)
class Dimensions:
    """Dimensions of values (B, *shape), without the batch.

    Args:
        numbers: as in torch, negative ones from the end.
        place: for errors.
    """

    numbers: tuple[int, ...]
    place: str

    def of(self, rank: int) -> tuple[int, ...]:
        """They as numbers >= 1 in order, for values with ``rank`` dimensions.

        Raises:
            UnsupportedOperation: the batch is among them, or they are out of range.
        """
        found = sorted({number + rank if number < 0 else number for number in self.numbers})
        if not found or found[0] < 1 or found[-1] >= rank:
            raise UnsupportedOperation(
                f"{self.place}: found dim={self.numbers} of {rank} dimensions; accepted: ones behind the batch"
            )
        return tuple(found)

    def last(self, x: Tensor) -> Tensor:
        """``x`` with these dimensions joined, as the last one."""
        gone = self.of(x.ndim)
        kept = [number for number in range(x.ndim) if number not in gone]
        return x.permute(*kept, *gone).flatten(len(kept))

    def back(self, x: Tensor) -> Tensor:
        """Reductions of ``last``, (…, 1), with these dimensions of size 1 in their places."""
        x = x.squeeze(-1)
        for number in self.of(x.ndim + len(self.numbers)):
            x = x.unsqueeze(number)
        return x


@dataclass(frozen=True, eq=False)
class Reduction(AveragePool):
    """Means or sums over dimensions.

    Args:
        function: of the value (B, *shape).
        dimensions: over which it adds up.
    """

    dimensions: Dimensions

    def roundings(self, shape: torch.Size) -> int:
        return self._count(shape) + 1

    def terms(self, shape: torch.Size) -> int:
        return self._count(shape) + 1

    def peak(self, *inputs: Tensor) -> Tensor:
        return self.magnitude(*inputs) * self._count(inputs[0].shape[1:])

    def _count(self, shape: torch.Size) -> int:
        whole = torch.Size((1, *shape))
        return torch.Size(whole[number] for number in self.dimensions.of(len(whole))).numel()


@dataclass(frozen=True, eq=False)
class Maximum(Unbounded):
    """The larger of two values, entry by entry; folding turns it into b + relu(a - b)."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(x, y)

    def interval(self, x: Interval, y: Interval) -> Interval:
        return Interval.from_bounds(torch.maximum(x.lower, y.lower), torch.maximum(x.upper, y.upper))

    def refusal(self) -> UnsupportedOperation:
        return UnsupportedOperation(f"{self.path}: found a maximum in linear bounds; accepted: a folded network")

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        return window if all(shape == shapes[0] for shape in shapes) else None

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(torch.maximum)

    def fold(self, folding: Folding, *sources: int) -> int:
        if folding.whole_pools:
            return folding.append(Maximum(self.path, sources))
        whole = broadcast_shape(*(folding.shapes[source] for source in sources))
        first, second = (
            source
            if folding.shapes[source] == whole
            else folding.append(Selection(self.path, (source,), _expanded(whole)))
            for source in sources
        )
        above = folding.append(Sum(self.path, (first, second), -1.0))
        above = folding.append(Relu(self.path, (above,)))
        return folding.append(Sum(self.path, (second, above), 1.0, maximum_of=(first, second)))


def _expanded(shape: torch.Size) -> Callable[[Tensor], Tensor]:
    return lambda x: x.expand(x.shape[0], *shape)


def maximum(append: Callable[[Any], int], path: str, sources: Sequence[int], *, sign: float = 1.0) -> int:
    """Append the largest of values, or with ``sign`` -1 the smallest, entry by entry; returns its position."""
    sources = sources if sign > 0 else [append(_negated(path, source)) for source in sources]
    largest = sources[0]
    for source in sources[1:]:
        largest = largest if source == largest else append(Maximum(path, (largest, source)))
    return largest if sign > 0 else append(_negated(path, largest))


def reduced_maximum(append: Callable[[Any], int], path: str, source: int, over: Dimensions, sign: float = 1.0) -> int:
    """Append the largest entries, or with ``sign`` -1 the smallest, over dimensions, which are kept with size 1."""
    source = source if sign > 0 else append(_negated(path, source))
    source = append(Selection(path, (source,), over.last))
    source = append(MaxPool(path, (source,), largest, 1))
    source = append(Rearrangement(path, (source,), over.back))
    return source if sign > 0 else append(_negated(path, source))


def largest(x: Tensor) -> Tensor:
    """The largest of the last dimension's entries, which is kept with size 1."""
    return x.amax(-1, keepdim=True)


def _negated(path: str, source: int) -> Scale:
    return Scale(path, (source,), lambda: (-1.0, 0.0))


def options(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a call behind its first, by name; ``names`` are those it takes, in order.

    Raises:
        UnsupportedOperation: another argument, or one that is computed.
    """
    given = {**dict(zip(names, node.args[1:])), **{k: v for k, v in node.kwargs.items() if k not in ("input", "self")}}
    wrong = [name for name, value in given.items() if name not in names or isinstance(value, fx.Node)]
    if wrong or len(node.args) > len(names) + 1:
        raise UnsupportedOperation(
            f"{node.target} at {node.name!r}: found {', '.join(wrong) or 'more arguments'}; "
            f"accepted: {', '.join(names)}, as numbers"
        )
    return given


def dimensions(node: fx.Node, given: Any) -> Dimensions:
    """The argument ``dim`` of a call.

    Raises:
        UnsupportedOperation: it is missing, and the batch would be reduced, too.
    """
    place = f"{getattr(node.target, '__name__', node.target)} at {node.name!r}"
    numbers: Any = (given,) if type(given) is int else given
    if not is_integers(numbers):
        raise UnsupportedOperation(f"{place}: found dim={given}; accepted: numbers of dimensions behind the batch")
    return Dimensions(tuple(numbers), place)


def _reduced(kind: Callable[..., Tensor]) -> Callable[[Tracing, fx.Node, int], int]:
    def rule(tracing: Tracing, node: fx.Node, source: int) -> int:
        given = options(node, "dim", "keepdim")
        over, keep = dimensions(node, given.get("dim")), bool(given.get("keepdim", False))

        def reduce(x: Tensor) -> Tensor:
            return kind(x, over.of(x.ndim), keep)

        return tracing.append(Reduction(node.name, (source,), reduce, over))

    return rule


def _extreme(sign: float) -> Callable[[Tracing, fx.Node, int], int]:
    def rule(tracing: Tracing, node: fx.Node, source: int) -> int:
        given = options(node, "dim", "keepdim")
        over = dimensions(node, given.get("dim"))
        source = reduced_maximum(tracing.append, node.name, source, over, sign)
        if given.get("keepdim", False):
            return source

        def squeeze(x: Tensor) -> Tensor:
            return x.squeeze(over.of(x.ndim))

        return tracing.append(Rearrangement(node.name, (source,), squeeze))

    return rule


def _of_two(sign: float) -> Callable[[Tracing, fx.Node, int], int]:
    def rule(tracing: Tracing, node: fx.Node, source: int) -> int:
        if len(node.args) != 2 or node.kwargs:
            raise UnsupportedOperation(f"{node.target} at {node.name!r}: accepted: two computed values")
        return maximum(tracing.append, node.name, (source, tracing.position(node, node.args[1])), sign=sign)

    return rule


from_function("mean")(_reduced(torch.mean))
from_function("sum")(_reduced(torch.sum))
from_function("amax")(_extreme(1.0))
from_function("amin")(_extreme(-1.0))
from_function("maximum")(_of_two(1.0))
from_function("minimum")(_of_two(-1.0))
