"""Activations: functions applied entry by entry, and the images of intervals under them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from .interval import Bounds, Interval

STRAIGHT = 1000.0
"""Beyond it GELU and SiLU equal 0 or x in every floating-point format; their formulas give NaN at infinity, and their
derivatives for large numbers."""


KERNEL_ERROR = 5
"""Times eps and max(1, |x|): how far smooth activations, as they are run, may be from the functions; paid for by
intervals and lines. It covers two kernels, torch's at an interval's end and the running network's inside it. Over 13
million float32 numbers, vector bodies and scalar tails (``scripts/measure_activations.py``; torch 2.15.0 with AVX512,
onnxruntime 1.31.1, with its optimisations and without), torch is off by 2.9 eps at most (GELU), onnxruntime by 1.8; in
float64 torch by 1.0."""


@dataclass(frozen=True)
class Trough:
    """The minimum of a function that falls up to it and rises from it on; both numbers rounded to nearest."""

    place: float
    value: float

    def lies_in(self, x: Bounds) -> Tensor:
        """Whether it may lie within the ends: never False where it does. Rounding is monotone, so the two neighbours of
        ``place``, in whichever format they are compared, enclose the true one."""
        return (x.lower <= math.nextafter(self.place, math.inf)) & (x.upper >= math.nextafter(self.place, -math.inf))

    def below(self, dtype: torch.dtype) -> float:
        """A number below the minimum, and below what torch computes near it, of which 4 eps leave enough: of all
        float32 in [-2, -0.25] the lowest value is 1.1 eps (relative) below the minimum at most."""
        return self.value * (1 + 4 * torch.finfo(dtype).eps)


# by 50-digit arithmetic: the roots of the derivatives
TROUGHS = {
    "gelu": Trough(-0.7517915246935644575, -0.1699712074799036617),
    "gelu_tanh": Trough(-0.7524614220710162585, -0.1700407505712540506),
    "silu": Trough(-1.2784645427610737951, -0.2784645427610737951),
}


@dataclass(frozen=True, eq=False)
class Activation:
    """A function applied entry by entry; ``kind`` is what the rules look at.

    Non-decreasing, or (GELU by erf or by tanh, SiLU) falling up to its one minimum and rising from there.
    """

    kind: str
    slope: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        match self.kind:
            case "relu":
                return F.relu(x)
            case "leaky_relu":
                return F.leaky_relu(x, self.slope)
            case "sigmoid":
                return torch.sigmoid(x)
            case "tanh":
                return torch.tanh(x)
            case "gelu":
                return F.gelu(x)
            case "gelu_tanh":
                return F.gelu(x, approximate="tanh")
            case "silu":
                return F.silu(x)
        raise NotImplementedError(self.kind)

    @property
    def monotone(self) -> bool:
        return self.kind not in TROUGHS

    @property
    def piecewise_linear(self) -> bool:
        return self.kind in ("relu", "leaky_relu")

    def image(self, x: Bounds) -> Bounds:
        """The values taken between two ends, as far as floating point tells them at the ends; differentiable.

        A minimum inside is rounded down, and its gradient is 0. Ends may be infinite; NaN stays NaN.
        """
        if self.monotone:
            return Bounds(self(x.lower), self(x.upper))
        trough, first, last = TROUGHS[self.kind], self._anywhere(x.lower), self._anywhere(x.upper)
        least = torch.where(trough.lies_in(x), trough.below(x.lower.dtype), torch.minimum(first, last))
        return Bounds(least, torch.maximum(first, last))

    def kernel_error(self, lower: Tensor, upper: Tensor) -> Tensor:
        """What kernels of a smooth function may be off by on [lower, upper]; without a gradient."""
        size = torch.maximum(lower.detach().abs(), upper.detach().abs()).clamp(min=1)
        if self.monotone:
            size = torch.ones_like(size)  # sigmoid and tanh saturate
        return KERNEL_ERROR * torch.finfo(size.dtype).eps * size

    def interval(self, x: Interval) -> Interval:
        """``image`` of centers and radii; of smooth functions, of what kernels make of them."""
        if self.kind == "relu":
            return Interval(*kernels.ibp_relu(x.center, x.radius))
        ends = x.bounds()
        found = self.image(ends)
        if not self.piecewise_linear:
            error = self.kernel_error(ends.lower, ends.upper)
            found = Bounds(found.lower - error, found.upper + error)
        return found.interval()

    def _anywhere(self, x: Tensor) -> Tensor:
        return torch.where(x > STRAIGHT, x, self(x.clamp(-STRAIGHT, STRAIGHT)))
