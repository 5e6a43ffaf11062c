"""Linear bounds of a folded network, carried forward from its input: the cheap way where few inputs vary.

Every number of the network lies between two lines over the box (the forward mode of arXiv 2002.12920). Backward passes
make tighter bounds, one for each neuron; these cost as many columns as inputs vary, for all neurons together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .clock import done, look
from .effort import work
from .folded import Concat, Convolution, Dense, Diagonal, Folded, Nonlinear, Operation, Rearrangement, Sum
from .interval import Bounds
from .region import Region
from .relaxation import relax


@dataclass(frozen=True)
class Between:
    """Lines over [-1, 1]^n, each (B, n + 1, *shape): slopes, then the constant."""

    lower: Tensor
    upper: Tensor

    def bounds(self) -> Bounds:
        lower = self.lower[:, -1] - self.lower[:, :-1].abs().sum(1)
        return Bounds(lower, self.upper[:, -1] + self.upper[:, :-1].abs().sum(1))


def forward_bounds(network: Folded, region: Region, given: Mapping[int, Bounds] | None = None) -> dict[int, Bounds]:
    """Bounds of every non-linear operation's input over boxes, as ``crown_bounds`` gives them, but looser.

    Args:
        given: other bounds, with which these are intersected.
    Raises:
        OutOfTime: by the clock, which is looked at before each operation.
    """
    lines = {0: _input(region)}
    intervals = {0: region.hull}
    found: dict[int, Bounds] = {}
    for number, operation in enumerate(network.operations[1:], start=1):
        numbers = lines[0].lower.shape[:2].numel() * network.shapes[number].numel()
        look(f"lines of {type(operation).__name__}", work(operation, numbers))
        inputs = [lines[read] for read in operation.inputs]
        if isinstance(operation, Nonlinear):
            (read,) = operation.inputs
            bounds = inputs[0].bounds().intersect(intervals[read].bounds())
            if given and number in given:
                bounds = bounds.intersect(given[number])
            bounds = Bounds(bounds.lower, torch.maximum(bounds.lower, bounds.upper))
            found[number], intervals[read] = bounds, bounds.interval()
        lines[number] = RULES[type(operation)](operation, *inputs, *([found[number]] if number in found else []))
        intervals[number] = operation.interval(*(intervals[read] for read in operation.inputs))  # type: ignore[attr-defined]
        if isinstance(operation, Sum) and operation.largest is not None:  # b + relu(a - b) forgets that b is b
            intervals[number] = intervals[number].as_largest(*(intervals[read] for read in operation.largest))
    done()
    return found


def _input(region: Region) -> Between:
    hull = region.hull
    radius = hull.radius.flatten(1)
    wide = (radius > 0).any(0).nonzero().flatten()
    slopes = radius.new_zeros(len(radius), len(wide) + 1, radius.shape[1])
    slopes[:, torch.arange(len(wide)), wide] = radius[:, wide]
    slopes[:, -1] = hull.center.flatten(1)
    lines = slopes.reshape(*slopes.shape[:2], *hull.center.shape[1:])
    return Between(lines, lines)


def _through(operation: Operation, lines: Tensor) -> Tensor:
    """A linear operation without constant, on each of the lines' numbers."""
    found = operation(lines.flatten(0, 1))  # type: ignore[operator]
    return found.reshape(*lines.shape[:2], *found.shape[1:])


def _weighted(operation: Dense | Convolution, x: Between) -> Between:
    up, down = (replace(operation, weight=part, bias=None)
                for part in (operation.weight.clamp(min=0), operation.weight.clamp(max=0)))  # fmt: skip
    ends = []
    for same, other in ((x.lower, x.upper), (x.upper, x.lower)):
        line = _through(up, same) + _through(down, other)
        if operation.bias is not None:
            bias = operation.bias.reshape(-1, *[1] * (operation.weight.ndim - 2))
            line[:, -1] += bias
        ends.append(line)
    return Between(*ends)


def _diagonal(operation: Diagonal, x: Between) -> Between:
    scale = operation.scale.unsqueeze(1) if operation.scale.ndim == x.lower.ndim - 1 else operation.scale
    up, down = scale.clamp(min=0), scale.clamp(max=0)
    shape = operation(x.lower[:, -1]).shape[1:]
    ends = []
    for same, other in ((x.lower, x.upper), (x.upper, x.lower)):
        line = (up * same + down * other).expand(*same.shape[:2], *shape).clone()
        line[:, -1] += operation.shift
        ends.append(line)
    return Between(*ends)


def _rearranged(operation: Rearrangement, x: Between) -> Between:
    lower, upper = (operation(end.flatten(0, 1)) for end in (x.lower, x.upper))
    lower, upper = (end.reshape(*x.lower.shape[:2], *end.shape[1:]) for end in (lower, upper))
    turned = bool((operation(torch.ones_like(x.lower[:1, -1])) < 0).any())  # an average's divisor may be negative
    return Between(upper, lower) if turned else Between(lower, upper)


def _sum(operation: Sum, x: Between, y: Between) -> Between:
    other = (y.lower, y.upper) if operation.sign > 0 else (-y.upper, -y.lower)
    return Between(x.lower + other[0], x.upper + other[1])


def _concat(operation: Concat, *parts: Between) -> Between:
    lower, upper = (torch.cat([getattr(x, end) for x in parts], operation.dim + 1) for end in ("lower", "upper"))
    return Between(lower, upper)


def _nonlinear(operation: Nonlinear, x: Between, bounds: Bounds) -> Between:
    own = relax(operation.activation, bounds.lower, bounds.upper)
    down, up = own.lower_slope.unsqueeze(1), own.upper_slope.unsqueeze(1)
    if operation.activation.monotone:
        lower, upper = down * x.lower, up * x.upper
    else:  # lines may fall
        lower = down.clamp(min=0) * x.lower + down.clamp(max=0) * x.upper
        upper = up.clamp(min=0) * x.upper + up.clamp(max=0) * x.lower
    upper[:, -1] += own.upper_intercept
    if own.lower_intercept is not None:
        lower[:, -1] += own.lower_intercept
    return Between(lower, upper)


RULES = {
    Dense: _weighted,
    Convolution: _weighted,
    Diagonal: _diagonal,
    Rearrangement: _rearranged,
    Sum: _sum,
    Concat: _concat,
    Nonlinear: _nonlinear,
}
