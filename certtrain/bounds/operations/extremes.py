"""Maxima and minima over dimensions, and of two values entry by entry."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from .base import Operation
from .options import Dimensions, dimensions, refuse
from .piecewise import Maximum
from .pooling import MaxPool
from .rearrangement import Rearrangement, Selection
from .registry import FunctionRule, Tracing, from_function
from .scale import Scale


def reduced_maximum(
    append: Callable[[Operation], int], path: str, source: int, over: Dimensions, sign: float = 1.0
) -> int:
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


def _extreme(sign: float) -> FunctionRule:
    def rule(tracing: Tracing, node: fx.Node, source: int) -> int:
        over, keepdim = dimensions(tracing, node)
        source = reduced_maximum(tracing.append, node.name, source, over, sign)
        return source if keepdim else tracing.append(Rearrangement(node.name, (source,), over.squeezed))

    return rule


def _of_two(sign: float) -> FunctionRule:
    def rule(tracing: Tracing, node: fx.Node, source: int) -> int:
        if len(node.args) != 2 or node.kwargs:
            refuse(node, "other arguments than two values", "two computed values")
        other = tracing.position(node, node.args[1])
        return source if other == source else tracing.append(Maximum(node.name, (source, other), sign))

    return rule


from_function("amax")(_extreme(1.0))
from_function("amin")(_extreme(-1.0))
from_function("maximum")(_of_two(1.0))
from_function("minimum")(_of_two(-1.0))
