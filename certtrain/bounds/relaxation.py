"""Linear enclosures of non-linear operations, for linear bounds carried backward or forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from .. import kernels
from .interval import Bounds


class Relaxation(ABC):
    """Linear bounds of an operation's output in terms of its inputs, over B boxes of inputs."""

    @abstractmethod
    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Carry lower bounds from the output to the inputs.

        Args:
            forms: (B, R, *shape) linear forms of the output; constants: (B, R), added to them.
        Returns:
            The forms of each input, (B, R, *its shape), and the constants: together lower bounds on the whole box.
        """

    @abstractmethod
    def forward(self, *inputs: InputLines) -> InputLines:
        """Carry lines, which are functions of the network's input, from the inputs to the output."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The relaxation with ``function`` applied to each of its tensors (B, *shape)."""


@dataclass(frozen=True)
class Lines(Relaxation):
    """lower_slope x + lower_intercept <= f(x) <= upper_slope x + upper_intercept, entry by entry.

    All are (B, *shape), or (B, R, *shape) with one per linear form; a ``lower_intercept`` of None is 0.

    Args:
        rising: whether all slopes are >= 0.
    """

    lower_slope: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor
    lower_intercept: Tensor | None = None
    rising: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> Lines:
        lower = None if self.lower_intercept is None else function(self.lower_intercept)
        slopes = function(self.lower_slope), function(self.upper_slope)
        return Lines(*slopes, function(self.upper_intercept), lower, self.rising)

    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        through, constants = kernels.crown_relu_step(
            forms, constants, self.lower_slope, self.upper_slope, self.upper_intercept
        )
        if self.lower_intercept is None:
            return (through,), constants
        intercept = self.lower_intercept
        intercept = intercept if intercept.ndim == forms.ndim else intercept.unsqueeze(1)
        return (through,), constants + (forms.clamp(min=0) * intercept).flatten(2).sum(-1)

    def forward(self, *inputs: InputLines) -> InputLines:
        (x,) = inputs
        down, up = self.lower_slope.unsqueeze(1), self.upper_slope.unsqueeze(1)
        if self.rising:
            lower, upper = down * x.lower, up * x.upper
        else:
            lower = down.clamp(min=0) * x.lower + down.clamp(max=0) * x.upper
            upper = up.clamp(min=0) * x.upper + up.clamp(max=0) * x.lower
        upper[:, -1] += self.upper_intercept
        if self.lower_intercept is not None:
            lower[:, -1] += self.lower_intercept
        return InputLines(lower, upper)


@dataclass(frozen=True)
class InputLines:
    """Linear functions of z in [-1, 1]^n, below and above every number of a value (B, *shape).

    Args:
        lower, upper: (B, n + 1, *shape): n slopes, then the constant.
    """

    lower: Tensor
    upper: Tensor

    def bounds(self) -> Bounds:
        """The minimum of the lower and the maximum of the upper lines, (B, *shape)."""
        lower = self.lower[:, -1] - self.lower[:, :-1].abs().sum(1)
        return Bounds(lower, self.upper[:, -1] + self.upper[:, :-1].abs().sum(1))

    def map(self, function: Callable[[Tensor], Tensor]) -> InputLines:
        """The lines of a linear function without constant and with non-negative coefficients."""
        return InputLines(map_lines(function, self.lower), map_lines(function, self.upper))

    def combine(self, positive: Callable[[Tensor], Tensor], negative: Callable[[Tensor], Tensor]) -> InputLines:
        """The lines of ``positive`` + ``negative``: linear functions without constant, the first with non-negative
        coefficients, the second with non-positive ones."""
        return InputLines(
            map_lines(positive, self.lower) + map_lines(negative, self.upper),
            map_lines(positive, self.upper) + map_lines(negative, self.lower),
        )

    def shifted(self, constant: Tensor) -> InputLines:
        """Add a constant that broadcasts with (B, *shape); changes the lines in place."""
        self.lower[:, -1] += constant
        self.upper[:, -1] += constant
        return self


def map_lines(function: Callable[[Tensor], Tensor], lines: Tensor) -> Tensor:
    """A function of a batch (N, *shape), applied to lines (B, n + 1, *shape)."""
    mapped = function(lines.flatten(0, 1))
    return mapped.reshape(*lines.shape[:2], *mapped.shape[1:])
