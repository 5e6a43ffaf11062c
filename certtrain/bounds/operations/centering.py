"""Rows minus their means: the linear part of layer, group and instance norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..interval import Bounds, Interval
from ..relaxation import InputLines, Relaxation
from .base import Function, LinearOperation, Nonlinear
from .rows import Rows

FLOAT32 = 2.0**-24
"""Unit roundoff of float32, in which files are evaluated."""
ROUNDING = 16
"""Roundings, plus the number of summands, that a row minus its mean may be off by, relative to its magnitude."""


@dataclass(frozen=True, eq=False)
class Centering(LinearOperation):
    """Rows minus their means, computed twice, so that a constant row gives exactly 0, as fused operators do."""

    rows: Rows

    def __call__(self, x: Tensor) -> Tensor:
        rows = self.rows.split(x)
        rows = rows - rows.mean(-1, keepdim=True)
        return self.rows.join(rows - rows.mean(-1, keepdim=True), x.shape[1:])

    def interval(self, x: Interval) -> Interval:
        """Exact: each entry is (1 - 1 / K) times its own, minus the others' share."""
        radius = self.rows.split(x.radius)
        count = radius.shape[-1]
        radius = radius * (1 - 2 / count) + radius.mean(-1, keepdim=True)
        return Interval(self(x.center), self.rows.join(radius.clamp(min=0), x.center.shape[1:]))

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        rows = self.rows.split_forms(forms)
        return (self.rows.join_forms(rows - rows.mean(-1, keepdim=True), shapes[0]),)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        (x,) = inputs
        low, high = self.rows.split_forms(x.lower), self.rows.split_forms(x.upper)
        count = low.shape[-1]
        # the others' mean share has the other sign
        below = low * (1 - 1 / count) - (high.sum(-1, keepdim=True) - high) / count
        above = high * (1 - 1 / count) - (low.sum(-1, keepdim=True) - low) / count
        shape = x.lower.shape[2:]
        return InputLines(self.rows.join_forms(below, shape), self.rows.join_forms(above, shape))

    def magnitude(self, x: Tensor) -> Tensor:
        rows = self.rows.split(x)
        return self.rows.join(rows + 3 * rows.mean(-1, keepdim=True), x.shape[1:])

    def roundings(self, shape: torch.Size) -> int:
        return 2 * shape.numel() + 4

    def terms(self, shape: torch.Size) -> int:
        return shape.numel() + 1

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)


@dataclass(frozen=True)
class Nearby(Relaxation):
    """A linear map, up to ``reach`` (B, *shape) on either side.

    Args:
        shape: of the map's input.
    """

    linear: LinearOperation
    shape: torch.Size
    reach: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Nearby:
        return Nearby(self.linear, self.shape, function(self.reach))

    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        lost = (forms.abs() * self.reach.unsqueeze(1)).flatten(2).sum(-1)
        return self.linear.adjoints(forms, self.shape), constants - lost

    def forward(self, *inputs: InputLines) -> InputLines:
        lines = self.linear.forward_lines(inputs, None)
        lower, upper = lines.lower.clone(), lines.upper.clone()
        lower[:, -1] -= self.reach
        upper[:, -1] += self.reach
        return InputLines(lower, upper)


@dataclass(frozen=True, eq=False)
class CenteringOnce(Nonlinear):
    """Rows minus their means, as the operators of files below opset 17 compute them.

    A row of equal numbers gives a rounding error instead of 0, which a norm may divide by the root of its eps: 1e-2
    from numbers around 1000. Bounds contain the exact result and float32's, summed in any order, so those of the chain
    and of the fused operator that onnxruntime's optimiser puts in its place.
    """

    rows: Rows

    kind: ClassVar[str] = "rows minus their means, rounded"

    @property
    def piecewise_linear(self) -> bool:
        return False

    @property
    def exact(self) -> Centering:
        return Centering(self.path, self.inputs, self.rows)

    def __call__(self, x: Tensor) -> Tensor:
        rows = self.rows.split(x)
        return self.rows.join(rows - rows.mean(-1, keepdim=True), x.shape[1:])

    def _reach(self, x: Interval) -> Tensor:
        size = self.magnitude(x.center.abs() + x.radius)
        return ((ROUNDING + self.rows.split(size).shape[-1]) * FLOAT32 * size).detach()

    def interval(self, x: Interval) -> Interval:
        exact = self.exact.interval(x)
        return Interval(exact.center, exact.radius + self._reach(x))

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> Nearby:
        """The exact map, up to roundings; there are no free parameters."""
        (x,) = (one.interval() for one in bounds)
        return Nearby(self.exact, x.center.shape[1:], self._reach(x))

    def open(self, *bounds: Bounds) -> list[Tensor]:
        """No entry: bounds that are a little tighter do not matter to roundings."""
        return [torch.zeros_like(x.lower, dtype=torch.bool) for x in bounds]

    def magnitude(self, x: Tensor) -> Tensor:
        rows = self.rows.split(x)
        return self.rows.join(rows + rows.mean(-1, keepdim=True), x.shape[1:])

    def roundings(self, shape: torch.Size) -> int:
        return shape.numel() + 2

    def terms(self, shape: torch.Size) -> int:
        return shape.numel() + 1

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)
