"""Piecewise linear functions: clips, |x| and PReLU. Folding writes them as ReLUs: branch and bound is complete."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx, nn

from ...typed import broadcast_shape
from ..interval import Bounds, Interval
from ..window import Window
from .affine import Weights
from .base import Folding, Function, Operation, Unbounded, UnsupportedOperation
from .rearrangement import Copies
from .registry import Tracing, entrywise, from_function, from_module, number
from .relu import Relu
from .scale import Constants, Scale
from .sum import Sum

BEYOND = 2.0**125
"""Size from which on a clip does nothing: no set is certified on which numbers may exceed a quarter of float32's
largest."""


@dataclass(frozen=True, eq=False)
class PiecewiseLinear(Unbounded):
    """A continuous piecewise linear function of each entry; folding replaces it by ReLUs."""

    def refusal(self) -> UnsupportedOperation:
        return UnsupportedOperation(
            f"{self.path}: found {type(self).__name__} in linear bounds; accepted: a folded network"
        )

    @abstractmethod
    def as_relus(self, folding: Folding, *sources: int) -> int:
        """Append the function as ReLUs of the values at ``sources``; return the position of the result."""

    def with_constants(self, folding: Folding) -> PiecewiseLinear:
        """The operation with fixed weights."""
        return self

    def fold(self, folding: Folding, *sources: int) -> int:
        if folding.whole_pools:
            return folding.append(replace(self.with_constants(folding), inputs=sources))
        return self.as_relus(folding, *sources)


@dataclass(frozen=True, eq=False)
class Clamp(PiecewiseLinear):
    """max(x, ``least``), then min(that, ``most``); infinite numbers leave an end as it is.

    Raises:
        UnsupportedOperation: an end is NaN, or too large to be shifted by.
    """

    least: float = -math.inf
    most: float = math.inf

    MODERATE: ClassVar[float] = 2.0**10
    """Largest end that folding writes as a shift: x - a and back has a's roundings, which should be no more than the
    logits' own."""
    ACCEPTED: ClassVar[str] = f"numbers of size {MODERATE:g} at most, or none"

    def __post_init__(self) -> None:
        for end in (self.least, self.most):
            if not self.takes(end):
                raise UnsupportedOperation(f"clip at {self.path!r}: found an end of {end}; accepted: {self.ACCEPTED}")

    @classmethod
    def takes(cls, end: float) -> bool:
        """Whether an end is accepted; those beyond any number that is certified count as none."""
        return abs(end) <= cls.MODERATE or abs(end) >= BEYOND

    def __call__(self, x: Tensor) -> Tensor:
        return x.clamp(self.least).clamp(max=self.most)

    def interval(self, x: Interval) -> Interval:
        return Bounds(self(x.lower), self(x.upper)).interval()

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)

    def as_relus(self, folding: Folding, *sources: int) -> int:
        (x,) = sources
        if abs(self.least) < BEYOND:
            x = self._shifted(folding, x, 1.0, -self.least)
            x = folding.append(Relu(self.path, (x,)))
            x = self._shifted(folding, x, 1.0, self.least)
        elif self.least > 0:
            x = self._shifted(folding, x, 0.0, self.least)
        if abs(self.most) < BEYOND:
            x = self._shifted(folding, x, -1.0, self.most)
            x = folding.append(Relu(self.path, (x,)))
            x = self._shifted(folding, x, -1.0, self.most)
        elif self.most < 0:
            x = self._shifted(folding, x, 0.0, self.most)
        return x

    def _shifted(self, folding: Folding, x: int, scale: float, shift: float) -> int:
        if scale == 1.0 and shift == 0.0:
            return x
        constants = Constants(*(folding.tensor(value, self.path) for value in (scale, shift)))
        return folding.append(Scale(self.path, (x,), constants))


@dataclass(frozen=True, eq=False)
class Maximum(PiecewiseLinear):
    """The larger of two values, entry by entry; with a ``sign`` of -1 the smaller."""

    sign: float = 1.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(x, y) if self.sign > 0 else torch.minimum(x, y)

    def interval(self, x: Interval, y: Interval) -> Interval:
        return Bounds(self(x.lower, y.lower), self(x.upper, y.upper)).interval()

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)

    def as_relus(self, folding: Folding, *sources: int) -> int:
        """max(x, y) = y + relu(x - y), min(x, y) = -max(-x, -y)."""
        shape = broadcast_shape(*(folding.shapes[source] for source in sources))
        x, y = (self._expanded(folding, source, shape) for source in sources)
        if self.sign < 0:
            x, y = negated(folding, x, self.path), negated(folding, y, self.path)
        above = folding.append(Relu(self.path, (folding.append(Sum(self.path, (x, y), -1.0)),)))
        larger = folding.append(Sum(self.path, (y, above), maximum_of=(x, y)))
        return larger if self.sign > 0 else negated(folding, larger, self.path)

    def _expanded(self, folding: Folding, source: int, shape: torch.Size) -> int:
        if folding.shapes[source] == shape:
            return source
        return folding.append(Copies(self.path, (source,), lambda x: x.expand(x.shape[0], *shape)))

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        return window if all(shape == shapes[0] for shape in shapes) else None


def negated(folding: Folding, source: int, path: str) -> int:
    """The position of the value at ``source`` times -1, appended."""
    constants = Constants(folding.tensor(-1.0, path), folding.tensor(0.0, path))
    return folding.append(Scale(path, (source,), constants))


@dataclass(frozen=True, eq=False)
class NegativePart(Sum):
    """x - relu(x), which is min(x, 0), and so is its interval."""

    def interval(self, x: Interval, y: Interval) -> Interval:
        return Bounds(x.lower.clamp(max=0), x.upper.clamp(max=0)).interval()


class Bent(PiecewiseLinear):
    """A function with its only kink at 0: x right of it, another multiple of x left of it."""

    def parts(self, folding: Folding, source: int) -> tuple[int, int]:
        """The positions of max(x, 0) and min(x, 0), by one ReLU."""
        positive = folding.append(Relu(self.path, (source,)))
        return positive, folding.append(NegativePart(self.path, (source, positive), -1.0))


@dataclass(frozen=True, eq=False)
class Abs(Bent):
    """|x|."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.abs()

    def interval(self, x: Interval) -> Interval:
        lower, upper = x.lower, x.upper
        return Bounds(torch.maximum(lower, -upper).clamp(min=0), torch.maximum(-lower, upper)).interval()

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(torch.abs)

    def as_relus(self, folding: Folding, *sources: int) -> int:
        (x,) = sources
        positive, negative = self.parts(folding, x)
        mirrored = negated(folding, x, self.path)
        return folding.append(Sum(self.path, (positive, negative), -1.0, maximum_of=(x, mirrored)))


class Sloped(Protocol):
    """The holder of PReLU's slopes, read at each use."""

    @property
    def weight(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class PRelu(Bent):
    """max(x, 0) + slope min(x, 0), with slopes of any sign and size.

    Args:
        layer: its ``weight`` holds the slopes.
        along: slopes to a tensor that broadcasts with (1, *shape), given the number of dimensions of (B, *shape).
    """

    layer: Sloped
    along: Callable[[Tensor, int], Tensor]

    def slopes(self, x: Tensor) -> Tensor:
        return self.along(self.layer.weight, x.ndim)

    def __call__(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) + x.clamp(max=0) * self.slopes(x)  # one of the two is 0

    def interval(self, x: Interval) -> Interval:
        lower, upper, slope = x.lower, x.upper, self.slopes(x.center)
        ends = [slope * lower.clamp(max=0), slope * upper.clamp(max=0)]
        left_low, left_high = torch.minimum(*ends), torch.maximum(*ends)
        right_low, right_high = lower.clamp(min=0), upper.clamp(min=0)
        # each part is 0 where the other one is not
        low = torch.where(upper <= 0, left_low, torch.where(lower >= 0, right_low, left_low.clamp(max=0)))
        high = torch.where(upper <= 0, left_high, torch.maximum(left_high, right_high))
        return Bounds(low, high).interval()

    def module(self, shape: torch.Size) -> nn.Module:
        if self.along is not along_channels:
            return Function(self)
        layer = nn.PReLU(device="meta")
        layer.weight = nn.Parameter(self.layer.weight.clone())
        return layer

    def with_constants(self, folding: Folding) -> PRelu:
        return replace(self, layer=Weights(folding.tensor(self.layer.weight, self.path), None))

    def as_relus(self, folding: Folding, *sources: int) -> int:
        (x,) = sources
        slope = self.along(folding.tensor(self.layer.weight, self.path), 1 + len(folding.shapes[x]))
        positive, negative = self.parts(folding, x)
        left = folding.append(Scale(self.path, (negative,), Constants(slope, folding.tensor(0.0, self.path))))
        return folding.append(Sum(self.path, (positive, left)))


def along_channels(weight: Tensor, dimensions: int) -> Tensor:
    """One slope, or one per channel in dimension 1, as torch's PReLU takes them."""
    return weight.reshape(1, -1, *[1] * (dimensions - 2))


def hard_sigmoid(path: str, source: int, append: Callable[[Operation], int]) -> int:
    """clip(x + 3, 0, 6) / 6, as torch computes it."""
    shifted = append(Scale(path, (source,), lambda: (1.0, 3.0)))
    clipped = append(Clamp(path, (shifted,), 0.0, 6.0))
    return append(Scale(path, (clipped,), lambda: (1 / 6, 0.0)))


@from_module(nn.ReLU6)
def _relu6(tracing: Tracing, path: str, source: int, module: nn.ReLU6) -> int:
    return tracing.append(Clamp(path, (source,), 0.0, 6.0))


@from_function("relu6")
def _relu6_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Clamp(node.name, (source,), 0.0, 6.0))


@from_module(nn.Hardtanh)
def _hardtanh(tracing: Tracing, path: str, source: int, module: nn.Hardtanh) -> int:
    return tracing.append(Clamp(path, (source,), float(module.min_val), float(module.max_val)))


@from_module(nn.Hardsigmoid)
def _hardsigmoid(tracing: Tracing, path: str, source: int, module: nn.Hardsigmoid) -> int:
    return hard_sigmoid(path, source, tracing.append)


@from_function("hardsigmoid")
def _hardsigmoid_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    return hard_sigmoid(node.name, source, tracing.append)


@from_function("clamp", "clip", "clamp_")
def _clamp(tracing: Tracing, node: fx.Node, source: int) -> int:
    ends = number(node, 1, "min", -math.inf), number(node, 2, "max", math.inf)
    return tracing.append(Clamp(node.name, (source,), *ends))


@from_function("clamp_min")
def _clamp_min(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Clamp(node.name, (source,), least=number(node, 1, "min", -math.inf)))


@from_function("clamp_max")
def _clamp_max(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Clamp(node.name, (source,), most=number(node, 1, "max", math.inf)))


@from_function("hardtanh", "hardtanh_")
def _hardtanh_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    ends = number(node, 1, "min_val", -1.0), number(node, 2, "max_val", 1.0)
    return tracing.append(Clamp(node.name, (source,), *ends))


@from_module(nn.PReLU)
def _prelu(tracing: Tracing, path: str, source: int, module: nn.PReLU) -> int:
    return tracing.append(PRelu(path, (source,), module, along_channels))


@dataclass(frozen=True, eq=False)
class _Looked:
    """Slopes that are a constant of the traced model."""

    constant: Any

    @property
    def weight(self) -> Tensor:
        return torch.as_tensor(self.constant.value())


@from_function("prelu")
def _prelu_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    slopes: Any = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
    known = tracing.values.get(slopes)
    if known is None or type(known) is int:
        raise UnsupportedOperation(f"prelu at {node.name!r}: found slopes {slopes}; accepted: a parameter or a buffer")
    return tracing.append(PRelu(node.name, (source,), _Looked(known), along_channels))


from_function("abs", "absolute")(entrywise(Abs))
