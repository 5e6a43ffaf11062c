"""Activations: functions of one number, applied entry by entry. Each kind is a subclass in a file of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..interval import Bounds, Interval
from ..relaxation import Lines
from ..window import Window
from .base import Graph, Nonlinear, alike

KERNEL_ERROR = 5
"""Error bound of smooth activations as kernels compute them, times eps and max(1, |x|); intervals and lines include it.

It covers two kernels: torch's at an interval's end, and the running network's inside. Measured largest errors over 13
million float32 numbers, in vector bodies and scalar tails: 2.9 eps for torch (GELU), 1.8 for onnxruntime; in float64
1.0 for torch (``scripts/measure_activations.py``; torch 2.15.0 with AVX512; onnxruntime 1.31.1, with and without its
optimisations)."""


@dataclass(frozen=True, eq=False)
class Entrywise(Nonlinear):
    """A function of one number, applied to each entry."""

    @abstractmethod
    def image(self, x: Bounds) -> Bounds:
        """The range of the function between two ends, from its floating-point values at the ends; differentiable.

        Ends may be infinite; NaN stays NaN.
        """

    @abstractmethod
    def lines(self, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
        """Lines over [lower, upper], both (B, *shape), that enclose the function and what kernels compute for it.

        Args:
            alpha: slopes of lower lines where the function has a kink inside the interval, clipped to sound ones; (B,
                *shape) or (B, R, *shape). None for the slope with the smaller area. Other functions ignore it here:
                ``relax`` tilts their lines.
        """

    def __call__(self, x: Tensor) -> Tensor:
        return self.value(x)

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """Evaluate the function at each entry."""

    @property
    def piecewise_linear(self) -> bool:
        return False

    def quotients(self, x: Bounds) -> Bounds | None:
        """Enclose (f(b) - f(a)) / (b - a) for all a and b between two ends; None where the function has no rule."""
        return None

    def kernel_error(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Largest error of kernels on [lower, upper], without a gradient.

        This default is for functions that grow like x.
        """
        size = torch.maximum(lower.detach().abs(), upper.detach().abs()).clamp(min=1)
        return KERNEL_ERROR * torch.finfo(size.dtype).eps * size

    def interval(self, x: Interval) -> Interval:
        """The range over an interval, widened by the kernels' error."""
        ends = x.bounds()
        image, error = self.image(ends), self.kernel_error(ends.lower, ends.upper)
        return Bounds(image.lower - error, image.upper + error).interval()

    def relax(self, *bounds: Bounds, alpha: Tensor | None = None) -> Lines:
        (x,) = bounds
        return self.lines(x.lower, x.upper, alpha)

    def change(self, other: Any, graph: Graph, values: Sequence[int], changes: Sequence[int | None]) -> int | None:
        from .difference import ActivationDifference  # imported here: it imports this module

        (d,), zero = changes, torch.zeros(1)
        if not alike(self, other) or not (self.piecewise_linear or self.quotients(Bounds(zero, zero))):
            return super().change(other, graph, values, changes)
        return None if d is None else graph.append(ActivationDifference(self.path, (*values, d), self))

    def magnitude(self, x: Tensor) -> Tensor:
        return x

    def peak(self, *inputs: Tensor) -> Tensor:
        return inputs[0].clamp(min=1)  # sigmoid(0) is 1/2

    def roundings(self, shape: torch.Size) -> int:
        return 2  # the slope's own, and the product's

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        return window if all(shape == shapes[0] for shape in shapes) else None
