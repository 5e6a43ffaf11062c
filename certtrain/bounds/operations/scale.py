"""Entrywise products and sums with constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...typed import broadcast_shape
from ..interval import Interval
from ..relaxation import InputLines, Relaxation
from ..window import Window
from .affine import with_weights
from .base import Folding, Graph, LinearOperation, summed_onto
from .sum import added

Coefficients = Callable[[], tuple[Tensor | float, Tensor | float]]
"""(scale, shift), looked up at each use, since buffers are replaced when a model moves."""


@dataclass(frozen=True, eq=False)
class Constants:
    """Fixed coefficients of a folded network; both broadcast with (1, *shape)."""

    scale: Tensor
    shift: Tensor

    def __call__(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift


@dataclass(frozen=True, eq=False)
class Scale(LinearOperation):
    """Elementwise ``scale * x + shift`` with constants of the model: numbers, parameters or buffers.

    Two in a row are not merged: in float32 that would be another network (x + 8192 - 8192 is not x).

    Args:
        exact: the coefficients in float64, where the model's dtype would round them.
        rounds: largest number of roundings of one output, relative to |scale x| + |shift|.
    """

    coefficients: Coefficients
    exact: Coefficients | None = None
    rounds: int = 2

    entrywise_map: ClassVar[bool] = True

    def __call__(self, x: Tensor) -> Tensor:
        scale, shift = self.coefficients()  # only numbers are compared: comparing a tensor would wait for the GPU
        x = x if isinstance(scale, float) and scale == 1.0 else x * scale
        return x if isinstance(shift, float) and shift == 0.0 else x + shift

    def interval(self, x: Interval) -> Interval:
        center, (scale, _) = self(x.center), self.coefficients()
        radius = x.radius if isinstance(scale, float) and abs(scale) == 1 else x.radius * abs(scale)
        return Interval(center, radius.expand_as(center))

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, shift) as tensors in the dtype and on the device of ``like``."""
        scale, shift = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in self.coefficients())
        return scale, shift

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        return (summed_onto(forms * self.tensors(forms)[0], shapes[0]),)

    def constant(self, forms: Tensor) -> Tensor:
        return (forms * self.tensors(forms)[1]).flatten(2).sum(-1)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        (x,) = inputs
        scale, shift = self.tensors(x.lower)
        scale = scale.unsqueeze(1) if scale.ndim == x.lower.ndim - 1 else scale
        up, down = scale.clamp(min=0), scale.clamp(max=0)
        shape = self(x.lower[:, -1]).shape[1:]
        lower, upper = (
            (up * same + down * other).expand(*same.shape[:2], *shape).clone()
            for same, other in ((x.lower, x.upper), (x.upper, x.lower))
        )
        return InputLines(lower, upper).shifted(shift)

    def entries(self, *numbers: Tensor) -> Tensor:
        shapes = [value.shape for value in self.coefficients() if isinstance(value, Tensor)]
        return numbers[0].expand(broadcast_shape(numbers[0].shape, *shapes))

    def magnitude(self, x: Tensor) -> Tensor:
        scale, shift = self.tensors(x)
        return x * scale.abs() + shift.abs()

    def roundings(self, shape: torch.Size) -> int:
        return self.rounds

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        local = all(isinstance(v, Tensor) and v.ndim == 4 and v.shape[2:].numel() == 1 for v in self.coefficients())
        return window if local else None

    def module(self, shape: torch.Size) -> nn.Module:
        """A 1×1 convolution for per-channel coefficients on images, whose zeros add no rounding; a linear layer for a
        single feature, as for a binary score turned into two logits; else an elementwise module."""
        scale, shift = (torch.as_tensor(v) for v in self.coefficients())
        vectors = [v.reshape(-1) for v in (scale, shift)]
        if shape == (1,) and max(v.ndim for v in (scale, shift)) == 1:
            outputs = max(map(len, vectors))
            weight, bias = (v.expand(outputs) for v in vectors)
            layer = nn.Linear(1, outputs, device="meta")
            return with_weights(layer, weight.reshape(-1, 1).clone(), bias.clone())
        places = [v.shape[-2:].numel() if v.ndim >= 2 else v.numel() for v in (scale, shift)]
        if len(shape) != 3 or places != [1, 1]:
            return _Elementwise(scale, shift)
        inputs, outputs = shape[0], max(shape[0], *map(len, vectors))  # RGB coefficients turn grey into three channels
        scale, shift = (v.expand(outputs) for v in vectors)
        weight = torch.diag(scale) if inputs == outputs else scale
        layer = nn.Conv2d(inputs, outputs, 1, device="meta")
        return with_weights(layer, weight.reshape(outputs, inputs, 1, 1), shift.clone() if shift.any() else None)

    def change(self, other: Any, graph: Graph, values: Sequence[int], changes: Sequence[int | None]) -> int | None:
        """scale' d + (scale' - scale) x + (shift' - shift)."""
        (before, constant), (scale, shift) = self.coefficients(), other.coefficients()
        if not (isinstance(before, Tensor) and isinstance(constant, Tensor)):
            return super().change(other, graph, values, changes)
        if not (isinstance(scale, Tensor) and isinstance(shift, Tensor)) or (before.shape, constant.shape) != (
            scale.shape, shift.shape,
        ):  # fmt: skip
            return super().change(other, graph, values, changes)
        own = Constants(graph.difference(before, scale), graph.difference(constant, shift))
        through = Constants(scale, torch.zeros_like(shift))
        parts = [graph.append(Scale(self.path, (d,), through)) for d in changes if d is not None]
        if bool(own.scale.any()) or bool(own.shift.any()):
            parts.append(graph.append(Scale(self.path, tuple(values), own)))
        return added(graph, self.path, parts)

    def fold(self, folding: Folding, *sources: int) -> int:
        if self.exact is not None and folding.as_written:
            scale, shift = (folding.finite(torch.as_tensor(v, device=folding.device), self.path) for v in self.exact())
        else:
            scale, shift = (folding.tensor(value, self.path) for value in self.coefficients())
        return folding.append(Scale(self.path, sources, Constants(scale, shift), rounds=self.rounds))


class _Elementwise(nn.Module):
    """``scale * x + shift``, without the operations that change nothing."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.scales, self.shifts = bool((scale != 1).any()), bool(shift.any())

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale if self.scales else x
        return x + self.shift if self.shifts else x
