"""Lines that enclose an activation over an interval: one small rule per kind, the table last.

ReLU and LeakyReLU as in CROWN (arXiv 1811.00866), with the lower slope free as in alpha-CROWN (arXiv 2011.13824);
sigmoid and tanh by tangents and chords (arXiv 1811.00866, section 3.3); GELU and SiLU in ``relaxation_gated.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from .activation import Activation
from .relaxation_gated import gated

ROUNDING = 4
"""Times eps and the numbers' size: what lines above tanh are lifted by, for the roundings of tanh and of a slope times
x. Ends around every switch, in both dtypes, needed 2.8 at most (``tests/test_lines.py``)."""


@dataclass(frozen=True)
class Lines:
    """lower_slope x + lower_intercept <= f(x) <= upper_slope x + upper_intercept on an interval of x.

    Each (B, *shape), or (B, R, *shape) where each of R linear forms has its own. ``lower_intercept`` None is 0.
    """

    lower_slope: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor
    lower_intercept: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Lines:
        """With another view of each tensor."""
        return Lines(*(None if v is None else function(v) for v in vars(self).values()))  # type: ignore[arg-type]

    def step(self, forms: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
        """Lower bounds: forms (B, R, *shape) of f(x), with constants (B, R), as forms of x."""
        through, constants = kernels.crown_relu_step(
            forms, constants, self.lower_slope, self.upper_slope, self.upper_intercept
        )
        if self.lower_intercept is None:
            return through, constants
        intercept = self.lower_intercept
        intercept = intercept if intercept.ndim == forms.ndim else intercept.unsqueeze(1)
        return through, constants + (forms.clamp(min=0) * intercept).flatten(2).sum(-1)


def relax(activation: Activation, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
    """Lines over [lower, upper], both (B, *shape); of smooth functions, around what kernels make of them.

    Args:
        alpha: lower slopes where the function has a kink inside the interval, cut to what is sound; (B, *shape) or
            (B, R, *shape). None chooses the one that makes the smaller area. Ignored by smooth functions.
    """
    lines = RELAXATIONS[activation.kind](activation, lower, upper, alpha)
    if lines.lower_intercept is None or not activation.monotone:  # gated lines leave room for it themselves
        return lines
    error = activation.kernel_error(lower, upper)
    return Lines(lines.lower_slope, lines.upper_slope, lines.upper_intercept + error, lines.lower_intercept - error)


def _kinked(activation: Activation, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
    low = activation.slope if activation.kind == "leaky_relu" else 0.0
    one = torch.ones_like(lower)  # where() of two numbers would be float32, and round a slope
    positive = lower >= 0
    unstable = ~(positive | (upper <= 0))  # so is NaN, of an overflow: its lines are NaN, and prove nothing
    half = torch.where(upper - lower == torch.inf, 0.5, one)  # two finite ends may be further apart than any number
    below, above = lower * half, upper * half
    width = torch.where(unstable, above - below, 1.0)
    share = above / width
    slope = torch.where(unstable, (above - low * below) / width, torch.where(positive, one, low))
    intercept = torch.where(unstable, -(1 - low) * lower * share, 0.0)
    # a share that underflows would be off by more than the upper end: the line through that end is as good
    lost = unstable & (share < torch.finfo(lower.dtype).tiny / torch.finfo(lower.dtype).eps)
    slope, intercept = torch.where(lost, low, slope), torch.where(lost, (1 - low) * upper, intercept)
    if alpha is None:
        return Lines(torch.where(unstable, torch.where(upper > -lower, one, low), slope), slope, intercept)
    if alpha.ndim > lower.ndim:
        unstable, fixed = unstable.unsqueeze(1), slope.unsqueeze(1)
    else:
        fixed = slope
    # clamp's own gradient is 0 at its ends, where ascents start: this one passes there and beyond
    sound = alpha.clamp(low, 1.0).detach() + (alpha - alpha.detach())
    return Lines(torch.where(unstable, sound, fixed), slope, intercept)


def _tanh(activation: Activation, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
    slope, intercept = _above_tanh(lower, upper)
    mirrored, below = _above_tanh(-upper, -lower)
    return Lines(mirrored, slope, intercept, -below)


def _sigmoid(activation: Activation, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
    """1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2."""
    slope, intercept = _above_tanh(lower / 2, upper / 2)
    mirrored, below = _above_tanh(-upper / 2, -lower / 2)
    return Lines(mirrored / 4, slope / 4, (1 + intercept) / 2, (1 - below) / 2)


def _gated(activation: Activation, lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Lines:
    (lower_slope, lower_intercept), (upper_slope, upper_intercept) = gated(activation, lower, upper)
    return Lines(lower_slope, upper_slope, upper_intercept, lower_intercept)


def _above_tanh(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, intercept) of a line above tanh: a chord, or a tangent at a point right of 0.

    Whichever slope is chosen, and however rounding made it, the intercept is the largest of tanh(x) - slope x: which
    slope is best may be decided wrongly next to a switch, the line is above the function all the same.
    """
    at_lower, at_upper = torch.tanh(lower), torch.tanh(upper)

    def tangent(point: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.tanh(point)
        slope = 1 - value * value
        return slope, value - slope * point

    with torch.no_grad():
        low, high = torch.zeros_like(lower), upper.clamp(min=0)
        slope, intercept = tangent(high)
        # a tangent right of 0 is above the concave half; where not even the one at ``upper`` is at ``lower``: a chord
        use_chord = (upper <= 0) | ((lower < 0) & (slope * lower + intercept < at_lower))
        for _ in range(30):
            middle = (low + high) / 2
            slope, intercept = tangent(middle)
            above = slope * lower + intercept >= at_lower
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        slope, intercept = tangent(high)
        # of the tangent's height at ``lower``, by its point
        derivative = (2 * torch.tanh(high) * slope * (high - lower)).clamp(min=1e-30)
    # the point moves with ``lower``: the implicit function's gradient, and no change of value
    height = slope * lower + intercept - at_lower
    touching = high - (height - height.detach()) / derivative
    # tangents further right are above it as well; the one in the middle leaves the smallest area
    slope, intercept = tangent(torch.maximum(touching, lower / 2 + upper / 2))
    width = upper - lower
    chord = torch.where(width > 0, (at_upper - at_lower) / torch.where(width > 0, width, 1.0), 1 - at_lower * at_lower)
    slope = torch.where(use_chord, chord, slope)
    # it rises, whatever rounding makes of a chord; and can be halved, and halved again, without a loss
    slope = torch.where(slope < 8 * torch.finfo(lower.dtype).tiny, 0.0, slope)
    intercept = torch.where(use_chord, at_lower - slope * lower, intercept)
    with torch.no_grad():
        lift = _largest_above(slope, lower, upper, at_lower, at_upper) - intercept
    return slope, intercept + lift


def _largest_above(slope: Tensor, lower: Tensor, upper: Tensor, at_lower: Tensor, at_upper: Tensor) -> Tensor:
    """tanh(x) - slope x on [lower, upper] at most, for any slope >= 0.

    Left of 0 it is convex, so largest at an end; right of 0 it is concave, and largest where the slope is tanh's own,
    at atanh(sqrt(1 - slope)), or as near as the interval comes. An error of that point counts by its square.
    """
    root = (1 - slope).clamp(min=0).sqrt()
    peak = torch.minimum(torch.maximum(torch.log1p(root) - slope.clamp(max=1).log() / 2, lower), upper)
    found = torch.maximum(at_lower - slope * lower, at_upper - slope * upper)
    found = torch.maximum(found, torch.tanh(peak) - slope * peak)
    size = 1 + slope * torch.maximum(lower.abs(), upper.abs())
    return found + ROUNDING * torch.finfo(lower.dtype).eps * size


RELAXATIONS: dict[str, Callable[[Activation, Tensor, Tensor, Tensor | None], Lines]] = {
    "relu": _kinked,
    "leaky_relu": _kinked,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "gelu": _gated,
    "gelu_tanh": _gated,
    "silu": _gated,
}
