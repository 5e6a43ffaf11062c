"""Euclidean norms, variances and standard deviations over dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..interval import Bounds
from ..relaxation import Lines, Relaxation
from .centering import Centering
from .elementary import Sqrt
from .options import Dimensions, options, refuse
from .rearrangement import Rearrangement, Selection
from .registry import Tracing, from_function
from .row_norm import SquareSum
from .rows import LastOnes


@dataclass(frozen=True, eq=False)
class RootOfSquares(Sqrt):
    """The root of a sum of squares, whose bounds are below 0 by rounding alone."""

    kind: ClassVar[str] = "the root of a sum of squares"

    def value(self, x: Tensor) -> Tensor:
        return torch.sqrt(x.clamp(min=0))

    def defined(self, lower: Tensor, upper: Tensor) -> Tensor:
        return super().defined(lower.clamp(min=0), upper.clamp(min=0))

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> Lines:
        return super().relax(*map(_from_0, bounds), alpha=alpha)

    def adjusted(self, relaxation: Relaxation, bounds: Sequence[Bounds], alpha: Tensor) -> Lines:
        return super().adjusted(relaxation, [*map(_from_0, bounds)], alpha)


def _from_0(x: Bounds) -> Bounds:
    return Bounds(x.lower.clamp(min=0), x.upper.clamp(min=0))


ROWS = LastOnes(1)
_Step = Callable[[int], Any]  # position of the input → operation


def _reduced(tracing: Tracing, node: fx.Node, source: int, over: Dimensions, keepdim: bool, *steps: _Step) -> int:
    """Append what gives rows of one number, over dimensions that are joined to rows first."""
    source = tracing.append(Selection(node.name, (source,), over.last))
    for step in steps:
        source = tracing.append(step(source))
    source = tracing.append(Rearrangement(node.name, (source,), over.back))
    return source if keepdim else tracing.append(Rearrangement(node.name, (source,), over.squeezed))


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _dimensions(node: fx.Node, dim: Any) -> Dimensions:
    if dim is None or type(dim) is bool or dim in ((), []):
        refuse(node, "all dimensions", "dim, which numbers dimensions behind the batch's")
    return Dimensions(node, dim)


@from_function("norm", "linalg_vector_norm", "linalg_norm")
def _norm(tracing: Tracing, node: fx.Node, source: int) -> int:
    power = "p" if _name(node) == "norm" else "ord"
    order, dim, keepdim, out, dtype = options(
        tracing, node, **{power: None}, dim=None, keepdim=False, out=None, dtype=None
    )
    over, spectral = _dimensions(node, dim), _name(node) == "linalg_norm" and order == 2 and not isinstance(dim, int)
    if order not in (2, "fro", None) or spectral or out is not None or dtype is not None:
        refuse(node, f"{power}={order}, dim={dim}, dtype={dtype}", "a Euclidean norm, in the input's type")

    def squares(position: int) -> SquareSum:
        return SquareSum(node.name, (position,), ROWS, mean=False)

    return _reduced(tracing, node, source, over, keepdim, squares, lambda place: RootOfSquares(node.name, (place,)))


@from_function("var", "std")
def _variance(tracing: Tracing, node: fx.Node, source: int) -> int:
    dim, unbiased, keepdim, correction = options(tracing, node, dim=None, unbiased=True, keepdim=False, correction=None)
    over, correction = _dimensions(node, dim), int(unbiased) if correction is None else correction
    if type(correction) is not int or correction < 0:
        refuse(node, f"correction={correction}", "a number of entries")

    def squares(position: int) -> SquareSum:
        return SquareSum(node.name, (position,), ROWS, correction=correction)

    steps: list[_Step] = [lambda place: Centering(node.name, (place,), ROWS), squares]
    if _name(node) == "std":
        steps.append(lambda place: RootOfSquares(node.name, (place,)))
    return _reduced(tracing, node, source, over, keepdim, *steps)
