"""Matrix products of two computed values, enclosed by sums of McCormick's planes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from ...typed import broadcast_shape, split
from ..interval import Bounds, Interval
from ..relaxation import InputLines, Relaxation
from .base import Function, Nonlinear, UnsupportedOperation, clipped, summed_onto
from .linear import Dense
from .product import ROUNDING
from .registry import Constant, Tracing, from_function

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
        x, y = _right(forms, self.second.center.mT), _left(self.first.center.mT, forms)
        middle = (self.first.center @ self.second.center).unsqueeze(1)
        constant = (forms * middle + forms.abs() * self.reach.unsqueeze(1)).flatten(2).sum(-1)
        if self.side is not None:
            side = self.side if self.side.ndim == forms.ndim else self.side.unsqueeze(1)
            size, signed = side * forms.abs(), side * forms
            x, y = x - _right(size, self.second.radius.mT), y - _left(self.first.radius.mT, signed)
            falling, rising = self.first.center @ self.second.radius, self.first.radius @ self.second.center
            constant = constant - (size * falling.unsqueeze(1) + signed * rising.unsqueeze(1)).flatten(2).sum(-1)
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


def _right(forms: Tensor, matrices: Tensor) -> Tensor:
    """Forms (B, R, …, M, N) times matrices (B, …, N, K): one product for all R, which a broadcast would not be."""
    rows = forms.movedim(1, -3)
    product = rows.flatten(-3, -2) @ matrices
    return product.reshape(*product.shape[:-2], *rows.shape[-3:-1], product.shape[-1]).movedim(-3, 1)


def _left(matrices: Tensor, forms: Tensor) -> Tensor:
    """Matrices (B, …, K, M) times forms (B, R, …, M, N)."""
    columns = forms.movedim(1, -2)
    product = matrices @ columns.flatten(-2)
    return product.reshape(*product.shape[:-1], *columns.shape[-2:]).movedim(-2, 1)


@dataclass(frozen=True, eq=False)
class MatrixProduct(Nonlinear):
    """The product of the last two dimensions of two computed values; those in front broadcast."""

    kind: ClassVar[str] = "matrix product of two computed values"

    @property
    def piecewise_linear(self) -> bool:
        return False

    @property
    def adjustable(self) -> bool:
        return True

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
        return MatrixPlanes(first, second, reach, None if alpha is None else 2 * clipped(alpha) - 1)

    def adjusted(self, relaxation: Relaxation, bounds: Sequence[Bounds], alpha: Tensor) -> MatrixPlanes:
        assert isinstance(relaxation, MatrixPlanes)
        return replace(relaxation, side=2 * clipped(alpha) - 1)

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


@dataclass(frozen=True, eq=False)
class _Columns:
    """A constant matrix (D, H) as the weight of a linear layer, looked up at each use."""

    matrix: Constant

    @property
    def bias(self) -> None:
        return None

    @property
    def weight(self) -> Tensor:
        found = self.matrix.value()
        if found.ndim != 2:
            raise UnsupportedOperation(f"matmul: found a constant of shape {(*found.shape,)}; accepted: a matrix")
        return found.mT


@from_function("matmul", "bmm")
def _matmul(tracing: Tracing, node: fx.Node, source: int) -> int:
    if len(node.args) != 2:
        raise UnsupportedOperation(f"{node.target} at {node.name!r}: accepted: two computed values in order")
    second = tracing.values.get(node.args[1]) if isinstance(node.args[1], fx.Node) else None
    if isinstance(second, Constant):
        return tracing.append(Dense(node.name, (source,), _Columns(second)))
    return tracing.append(MatrixProduct(node.name, (source, tracing.position(node, node.args[1]))))
