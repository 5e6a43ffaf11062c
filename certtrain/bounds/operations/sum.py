"""Sums and differences of two values: residual connections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..interval import Interval
from ..relaxation import InputLines, Relaxation
from ..window import Window
from .base import Function, Graph, LinearOperation, alike, summed_onto


@dataclass(frozen=True, eq=False)
class Sum(LinearOperation):
    """The first input plus ``sign`` times the second.

    Args:
        sign: 1 or -1.
        maximum_of: two positions, if this sum equals the maximum of their outputs; bounds then use it.
    """

    sign: float = 1.0
    maximum_of: tuple[int, int] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.sign * y

    def interval(self, x: Interval, y: Interval) -> Interval:
        return Interval(x.center + self.sign * y.center, x.radius + y.radius)

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        first, second = shapes
        return summed_onto(forms, first), summed_onto(self.sign * forms, second)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        x, y = inputs
        if self.sign > 0:
            return InputLines(x.lower + y.lower, x.upper + y.upper)
        return InputLines(x.lower + -y.upper, x.upper + -y.lower)

    def magnitude(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def roundings(self, shape: torch.Size) -> int:
        return 1

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        return window if all(shape == shapes[0] for shape in shapes) else None

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(torch.add if self.sign > 0 else torch.sub)

    def change(self, other: Any, graph: Graph, values: Sequence[int], changes: Sequence[int | None]) -> int | None:
        """The sum of both changes; of a single one as it is, where it has the output's shape."""
        first, second = changes
        shapes = [graph.shapes[value] for value in values]
        if not alike(self, other, "maximum_of"):
            return super().change(other, graph, values, changes)
        if first is not None and second is not None:
            return graph.append(Sum(self.path, (first, second), self.sign))
        if first is None and second is None:
            return None
        if shapes[0] != shapes[1]:
            return super().change(other, graph, values, changes)
        if second is None or self.sign > 0:
            return first if second is None else second
        return graph.append(Sum(self.path, (graph.zeros(values[0]), second), self.sign))


def added(graph: Graph, path: str, parts: Sequence[int]) -> int | None:
    """The position of the sum of the values at ``parts``, two at most; None for none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return graph.append(Sum(path, (parts[0], parts[1])))
