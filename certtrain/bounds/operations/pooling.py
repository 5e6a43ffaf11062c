"""Pools: averages are linear; folding turns maxima into ReLUs, max(a, b) = b + relu(a - b)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..interval import Interval
from ..relaxation import InputLines, Relaxation
from .base import Folding, Unbounded, UnsupportedOperation
from .plain_pools import plain_pool
from .rearrangement import Rearrangement, Selection
from .registry import FunctionRule, Tracing, from_function, from_module
from .relu import Relu
from .sum import Sum


@dataclass(frozen=True, eq=False)
class AveragePool(Rearrangement):
    """Averages or sums over windows of the last dimensions; all coefficients have one sign, that of the divisor."""

    entrywise_map: ClassVar[bool] = False

    def interval(self, x: Interval) -> Interval:
        return Interval(self.function(x.center), self.function(x.radius).abs())  # a divisor may be negative

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        lines = inputs[0].map(self.function)
        negative = bool((self.function(torch.ones_like(inputs[0].lower[:1, -1])) < 0).any())
        return InputLines(lines.upper, lines.lower) if negative else lines

    def roundings(self, shape: torch.Size) -> int:
        return shape[-2:].numel() + 1

    def peak(self, *inputs: Tensor) -> Tensor:
        """The sum before the division."""
        return self.magnitude(*inputs) * self.terms(inputs[0].shape[1:])

    def module(self, shape: torch.Size) -> nn.Module:
        return plain_pool(self.function, shape, averages=True) if len(shape) in (2, 3) else super().module(shape)


@dataclass(frozen=True, eq=False)
class MaxPool(Unbounded):
    """Maxima over windows of the last ``dimensions`` dimensions; monotone in every entry."""

    function: Callable[[Tensor], Tensor]
    dimensions: int = 2

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def interval(self, x: Interval) -> Interval:
        return Interval.from_bounds(self.function(x.lower), self.function(x.upper))

    def refusal(self) -> UnsupportedOperation:
        return UnsupportedOperation(f"{self.path}: found a max pool in linear bounds; accepted: a folded network")

    def module(self, shape: torch.Size) -> nn.Module:
        return plain_pool(self.function, shape, averages=False)

    def fold(self, folding: Folding, *sources: int) -> int:
        (source,) = sources
        if folding.whole_pools:
            return folding.append(MaxPool(self.path, sources, self.function, self.dimensions))
        windows, shape = self._windows(folding.shapes[source])

        def pick(column: int) -> Callable[[Tensor], Tensor]:
            index = windows[:, column].to(folding.device)
            return lambda x: x.flatten(-self.dimensions)[..., index].reshape(*x.shape[: -self.dimensions], *shape)

        def largest(first: int, last: int) -> int:
            """The position of the maximum over the windows' columns [first, last), by halves."""
            if last - first == 1:
                return folding.append(Selection(self.path, (source,), pick(first)))
            middle = (first + last) // 2
            left, right = largest(first, middle), largest(middle, last)
            above = folding.append(Sum(self.path, (left, right), -1.0))
            above = folding.append(Relu(self.path, (above,)))
            return folding.append(Sum(self.path, (right, above), 1.0, maximum_of=(left, right)))

        return largest(0, windows.shape[1])

    def _windows(self, shape: torch.Size) -> tuple[Tensor, torch.Size]:
        """(outputs, size), the flat places of each output's window, padded by repeats, and the output's shape."""
        sizes = shape[-self.dimensions :]
        places = sizes.numel()
        probes = torch.full((places, 1, places), -1.0).diagonal_scatter(torch.ones(1, places), dim1=0, dim2=2)
        responses = self.function(probes.reshape(places, 1, *sizes))
        in_window = (responses.reshape(places, -1) > 0).T
        columns = [row.nonzero().flatten() for row in in_window]
        if not all(len(column) for column in columns):
            raise UnsupportedOperation(
                f"{self.path}: found a window over padding alone; accepted: windows that see the image"
            )
        size = max(len(column) for column in columns)
        return torch.stack([torch.cat([c, c[:1].expand(size - len(c))]) for c in columns]), responses.shape[2:]


@from_module(nn.MaxPool1d, nn.AdaptiveMaxPool1d)
def _max_pool_1d(tracing: Tracing, path: str, source: int, module: Any) -> int | None:
    return None if module.return_indices else tracing.append(MaxPool(path, (source,), module, 1))


@from_module(nn.MaxPool2d, nn.AdaptiveMaxPool2d)
def _max_pool_2d(tracing: Tracing, path: str, source: int, module: Any) -> int | None:
    return None if module.return_indices else tracing.append(MaxPool(path, (source,), module, 2))


@from_module(nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
def _average_pool(tracing: Tracing, path: str, source: int, module: nn.Module) -> int:
    return tracing.append(AveragePool(path, (source,), module))


def _functional(dimensions: int | None) -> FunctionRule:
    """Tracing rule of a functional pool: a maximum over ``dimensions`` dimensions; an average for None."""

    def rule(tracing: Tracing, node: fx.Node, source: int) -> int:
        options, keywords = node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}
        called: Any = node.target
        if keywords.pop("return_indices", False):
            raise UnsupportedOperation(
                f"{node.name!r}: found return_indices=True; accepted: max pooling without indices"
            )
        if any(isinstance(option, fx.Node) for option in (*options, *keywords.values())):
            raise UnsupportedOperation(f"{node.name!r}: a pool whose size depends on the images; accepted: numbers")

        def pool(x: Tensor) -> Tensor:
            return called(x, *options, **keywords)

        if dimensions is None:
            return tracing.append(AveragePool(node.name, (source,), pool))
        return tracing.append(MaxPool(node.name, (source,), pool, dimensions))

    return rule


from_function("max_pool1d", "adaptive_max_pool1d")(_functional(1))
from_function("max_pool2d", "adaptive_max_pool2d")(_functional(2))
from_function("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")(_functional(None))
