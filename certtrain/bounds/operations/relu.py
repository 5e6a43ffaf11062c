"""ReLU and LeakyReLU, with the lines of CROWN (arXiv 1811.00866) and alpha-CROWN's free lower slope
(arXiv 2011.13824)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ... import kernels
from ..interval import Bounds, Interval
from ..relaxation import Lines, Relaxation
from .base import UnsupportedOperation, clipped
from .entrywise import Entrywise
from .registry import Tracing, from_function, from_module


@dataclass(frozen=True, eq=False)
class Kinked(Entrywise):
    """max(x, slope x) with a slope in [0, 1]."""

    @property
    def piecewise_linear(self) -> bool:
        return True

    def image(self, x: Bounds) -> Bounds:
        return Bounds(self(x.lower), self(x.upper))

    def interval(self, x: Interval) -> Interval:
        return self.image(x.bounds()).interval()

    def open(self, *bounds: Bounds) -> list[Tensor]:
        return [(x.lower < 0) & (x.upper > 0) for x in bounds]

    def adjusted(self, relaxation: Relaxation, bounds: Sequence[Bounds], alpha: Tensor) -> Lines:
        assert isinstance(relaxation, Lines)
        return replace(relaxation, lower_slope=alpha)

    def peak(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        low = self.kink
        one = torch.ones_like(lower)  # where() of two Python numbers would be float32
        positive = lower >= 0
        unstable = ~(positive | (upper <= 0))  # NaN counts as unstable: its lines are NaN, and prove nothing
        half = torch.where(upper - lower == torch.inf, 0.5, one)  # upper - lower may overflow
        below, above = lower * half, upper * half
        width = torch.where(unstable, above - below, 1.0)
        share = above / width
        slope = torch.where(unstable, (above - low * below) / width, torch.where(positive, one, low))
        intercept = torch.where(unstable, -(1 - low) * lower * share, 0.0)
        # where the share underflows, its error exceeds the upper end: use the line through that end instead
        lost = unstable & (share < torch.finfo(lower.dtype).tiny / torch.finfo(lower.dtype).eps)
        slope, intercept = torch.where(lost, low, slope), torch.where(lost, (1 - low) * upper, intercept)
        if alpha is None:
            lower_slope = torch.where(unstable, torch.where(upper > -lower, one, low), slope)
            return Lines(lower_slope, slope, intercept, rising=True)
        if alpha.ndim > lower.ndim:
            unstable, fixed = unstable.unsqueeze(1), slope.unsqueeze(1)
        else:
            fixed = slope
        return Lines(torch.where(unstable, clipped(alpha, low), fixed), slope, intercept, rising=True)


@dataclass(frozen=True, eq=False)
class Relu(Kinked):
    """max(x, 0)."""

    kind: ClassVar[str] = "relu"

    def value(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def interval(self, x: Interval) -> Interval:
        return Interval(*kernels.ibp_relu(x.center, x.radius))

    def roundings(self, shape: torch.Size) -> int:
        return 0

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.ReLU()


@dataclass(frozen=True, eq=False)
class LeakyRelu(Kinked):
    """max(x, slope x).

    Raises:
        UnsupportedOperation: the slope is not in [0, 1].
    """

    slope: float

    kind: ClassVar[str] = "leaky_relu"

    def __post_init__(self) -> None:
        if not 0 <= self.slope <= 1:
            raise UnsupportedOperation(
                f"LeakyReLU at {self.path!r}: found slope {self.slope}; accepted: a slope in [0, 1]"
            )

    @property
    def kink(self) -> float:
        return self.slope

    def value(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.LeakyReLU(self.slope)


@from_module(nn.ReLU)
def _relu(tracing: Tracing, path: str, source: int, module: nn.ReLU) -> int:
    return tracing.append(Relu(path, (source,)))


@from_function("relu", "relu_")
def _relu_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Relu(node.name, (source,)))


@from_module(nn.LeakyReLU)
def _leaky(tracing: Tracing, path: str, source: int, module: nn.LeakyReLU) -> int:
    return tracing.append(LeakyRelu(path, (source,), module.negative_slope))


@from_function("leaky_relu")
def _leaky_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    slope: Any = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
    return tracing.append(LeakyRelu(node.name, (source,), slope))
