"""Matrix products of two computed values, enclosed by sums of McCormick's planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from ...typed import broadcast_shape, split
from ..interval import Bounds, Interval
from ..relaxation import InputLines, Relaxation
from .base import Function, Nonlinear, UnsupportedOperation, summed_onto
from .product import ROUNDING
from .registry import Tracing, from_function

PRODUCTS = 2**22
"""Products of one interval that are held at once: corners of more are added up row by row."""


@dataclass(frozen=True)
class MatrixPlanes(Relaxation):
    """Planes around the products that make up x y, over the boxes ``first`` of x and ``second`` of y.

    All have centers c and radii r; those of entry (m, n) lie within c_y x + c_x y - c_x c_y +- ``reach``, added up over
    the products, or are moved by ``side`` in [-1, 1], as in ``mccormick``.

    Args:
        first, second: (B, …, M, K) and (B, …, K, N).
        reach: (B, …, M, N), r_x r_y, and room for roundings.
        side: (B, …, M, N) or (B, R, …, M, N); None is 0.
    """

    first: Interval
    second: Interval
    reach: Tensor
    side: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> MatrixPlanes:
        side = None if self.side is None else function(self.side)
        return MatrixPlanes(self.first.map(function), self.second.map(function), function(self.reach), side)

    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        cx, cy = self.first.center.unsqueeze(1), self.second.center.unsqueeze(1)
        x, y = forms @ cy.mT, cx.mT @ forms
        middle = (self.first.center @ self.second.center).unsqueeze(1)
        constant = (forms * middle + forms.abs() * self.reach.unsqueeze(1)).flatten(2).sum(-1)
        if self.side is not None:
            rx, ry = self.first.radius.unsqueeze(1), self.second.radius.unsqueeze(1)
            side = self.side if self.side.ndim == forms.ndim else self.side.unsqueeze(1)
            size, signed = side * forms.abs(), side * forms
            x, y = x - size @ ry.mT, y - rx.mT @ signed
            constant = constant - (size * (cx @ ry) + signed * (rx @ cy)).flatten(2).sum(-1)
        shapes = self.first.center.shape[1:], self.second.center.shape[1:]
        return (summed_onto(x, shapes[0]), summed_onto(y, shapes[1])), constants - constant

    def forward(self, *inputs: InputLines) -> InputLines:
        x, y = inputs
        cx, cy = self.first.center.unsqueeze(1), self.second.center.unsqueeze(1)
        right, wrong = cy.clamp(min=0), cy.clamp(max=0)
        left, other = cx.clamp(min=0), cx.clamp(max=0)
        lower = x.lower @ right + x.upper @ wrong + left @ y.lower + other @ y.upper
        upper = x.upper @ right + x.lower @ wrong + left @ y.upper + other @ y.lower
        middle = self.first.center @ self.second.center
        lower[:, -1] -= middle + self.reach
        upper[:, -1] -= middle - self.reach
        return InputLines(lower, upper)


@dataclass(frozen=True, eq=False)
class MatrixProduct(Nonlinear):
    """The product of the last two dimensions of two computed values; those in front broadcast."""

    kind: ClassVar[str] = "matrix product of two computed values"

    @property
    def piecewise_linear(self) -> bool:
        return False

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    def interval(self, x: Interval, y: Interval) -> Interval:
        """The exact range of each entry: the sum of its products' ranges, each over all corners."""
        size = broadcast_shape(x.center.shape[:-2], y.center.shape[:-2]).numel()
        rows = max(1, PRODUCTS // max(1, size * y.center.shape[-2:].numel()))
        parts = [_ranges(Interval(*ends), y) for ends in zip(split(x.center, rows, -2), split(x.radius, rows, -2))]
        return Interval(torch.cat([part.center for part in parts], -2), torch.cat([part.radius for part in parts], -2))

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> MatrixPlanes:
        """Planes; an ``alpha`` mixes the two of McCormick's on each side (1 and 0), None is their mean."""
        first, second = (x.interval() for x in bounds)
        size = (first.center.abs() + first.radius) @ (second.center.abs() + second.radius)
        count = (ROUNDING + first.center.shape[-1]) * torch.finfo(size.dtype).eps
        reach = first.radius @ second.radius + (count * size + torch.finfo(size.dtype).tiny).detach()
        return MatrixPlanes(first, second, reach, None if alpha is None else 2 * alpha.clamp(0, 1) - 1)

    def magnitude(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    def roundings(self, shape: torch.Size) -> int:
        return shape[-1] + 1

    def terms(self, shape: torch.Size) -> int:
        return shape[-1] + 1

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(torch.matmul)


def _ranges(x: Interval, y: Interval) -> Interval:
    """``MatrixProduct.interval`` of a few rows at once."""
    left, right = x.map(lambda v: v.unsqueeze(-1)), y.map(lambda v: v.unsqueeze(-3))
    cx, rx, cy, ry = left.center, left.radius, right.center, right.radius
    # the corners are c_x c_y + p + q + c, c_x c_y - p - q + c, c_x c_y + p - q - c and c_x c_y - p + q - c
    p, q, c = rx * cy, cx * ry, rx * ry
    alike, unlike = (p + q).abs(), (p - q).abs()
    up = torch.maximum(alike + c, unlike - c).sum(-2)
    down = torch.maximum(alike - c, unlike + c).sum(-2)
    middle = x.center @ y.center
    return Interval(middle + (up - down) / 2, (up + down) / 2)


@from_function("matmul", "bmm")
def _matmul(tracing: Tracing, node: fx.Node, source: int) -> int:
    if len(node.args) != 2:
        raise UnsupportedOperation(f"{node.target} at {node.name!r}: accepted: two computed values in order")
    return tracing.append(MatrixProduct(node.name, (source, tracing.position(node, node.args[1]))))
