"""A network whose gradient sees past activations that are flat at a point.

A gradient knows only the activations that are not flat where it is taken. Descent ends on a plateau when the way to a
counterexample leads through others, as in networks trained by interval bounds, whose ReLUs are 0 nearly everywhere, and
in those trained to hide one. The chord of an activation over the bounds of its input has a slope in all of these. A
descent that begins with a share of the chords' slopes and ends with the activations' own passes such plateaus: with
half of them and 20 steps it meets, from random points, counterexamples that a thousand descents without do not.

Slopes other than the network's have helped attacks past obfuscated gradients (arXiv 1802.00420) and from one network to
another (arXiv 2012.03528); there they are the same for all inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..bounds import Bounds
from ..bounds.network import Network
from ..bounds.operations import Entrywise


@dataclass(frozen=True, eq=False)
class Chords:
    """The slopes of activations' chords for B problems.

    Args:
        network: the folded network; dtype: the precision in which it is evaluated.
        slopes: (B, *shape) for each activation with bounds, by its position; other operations have none.
    """

    network: Network
    dtype: torch.dtype
    slopes: Mapping[int, Tensor]

    @classmethod
    def of(cls, network: Network, dtype: torch.dtype, bounds: Mapping[int, Bounds]) -> Self:
        """The chords over bounds of the activations' inputs, by position; none where these are unknown."""
        slopes = dict[int, Tensor]()
        for number, ends in bounds.items():
            operation = network.operations[number]
            if isinstance(operation, Entrywise):
                width, rise = ends.upper - ends.lower, operation(ends.upper) - operation(ends.lower)
                slopes[number] = torch.where(width > 0, rise / width, 0.0).nan_to_num(0.0, 0.0, 0.0)
        return cls(network, dtype, slopes)

    def take(self, index: Tensor) -> Self:
        return replace(self, slopes={number: own[index] for number, own in self.slopes.items()})

    def __call__(self, points: Tensor, share: Tensor) -> Tensor:
        """(B, K) logits at ``points`` (B, *shape), one for each problem, with gradients by mixed slopes: ``share`` (B,)
        times the chord's, plus the rest times the activation's own."""
        values = [points.to(self.dtype)]
        for number, operation in enumerate(self.network.operations[1:], start=1):
            inputs = [values[read] for read in operation.inputs]
            output = operation(*inputs)
            if number in self.slopes:
                part = share.to(self.dtype).view(-1, *[1] * (output.ndim - 1))
                output = _Mixed.apply(output, inputs[0], 1 - part, part * self.slopes[number])
            values.append(output)
        return values[-1]


class _Mixed(torch.autograd.Function):
    """A function's output, with ``own`` times its own gradient, and ``slope`` times that of the output by x."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, own: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(own, slope)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, None, None]:
        (gradient,), (own, slope) = grad_outputs, ctx.saved_tensors
        return gradient * own, gradient * slope, None, None
