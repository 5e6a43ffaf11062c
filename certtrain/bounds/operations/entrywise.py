"""Activations: functions applied entry by entry. Each kind is a class in a file of its own, derived from this one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..interval import Bounds, Interval
from ..relaxation import Lines
from ..window import Window
from .base import Nonlinear

KERNEL_ERROR = 5
"""Times eps and max(1, |x|): how far smooth activations, as they are run, may be from the functions; paid for by
intervals and lines. It covers two kernels, torch's at an interval's end and the running network's inside it. Over 13
million float32 numbers, vector bodies and scalar tails (``scripts/measure_activations.py``; torch 2.15.0 with AVX512,
onnxruntime 1.31.1, with its optimisations and without), torch is off by 2.9 eps at most (GELU), onnxruntime by 1.8; in
float64 torch by 1.0."""


@dataclass(frozen=True, eq=False)
class Entrywise(Nonlinear):
    """A function of one number, applied to each entry."""

    @abstractmethod
    def image(self, x: Bounds) -> Bounds:
        """The values taken between two ends, as far as floating point tells them at the ends; differentiable.

        Ends may be infinite; NaN stays NaN.
        """

    @abstractmethod
    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        """Lines over [lower, upper], both (B, *shape), that enclose what kernels make of the function.

        Args:
            alpha: slopes of lower lines where the function has a kink inside the interval, cut to what is sound; (B,
                *shape) or (B, R, *shape). None chooses the one that makes the smaller area. Smooth functions ignore it.
        """

    def __call__(self, x: Tensor) -> Tensor:
        return self.value(x)

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """The function."""

    @property
    def piecewise_linear(self) -> bool:
        return False

    def kernel_error(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The distance on [lower, upper] between the function and what kernels make of it; without a gradient.

        This one is of functions that grow like x.
        """
        size = torch.maximum(lower.detach().abs(), upper.detach().abs()).clamp(min=1)
        return KERNEL_ERROR * torch.finfo(size.dtype).eps * size

    def interval(self, x: Interval) -> Interval:
        """``image`` of centers and radii, around what kernels make of it."""
        ends = x.bounds()
        found, error = self.image(ends), self.kernel_error(ends.lower, ends.upper)
        return Bounds(found.lower - error, found.upper + error).interval()

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> Lines:
        (x,) = bounds
        return self.lines(x.lower, x.upper, alpha)

    def magnitude(self, x: Tensor) -> Tensor:
        return x

    def peak(self, *inputs: Tensor) -> Tensor:
        return inputs[0].clamp(min=1)  # sigmoid(0) is 1/2

    def roundings(self, shape: torch.Size) -> int:
        return 2  # the slope's own, and the product's

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        return window if all(shape == shapes[0] for shape in shapes) else None
