"""Lines that enclose GELU and SiLU, by tangents and chords.

Both are x (1 + T(x)) / 2 with an odd T that rises from -1 to 1, so they are x / 2 plus an even h(x) = x T(x) / 2. h is
convex on [-bend, bend] and concave on either side; by symmetry, intervals whose middle is >= 0 suffice. Bisection finds
where a line touches h, but soundness does not depend on it: the line's constant is computed directly. On a convex piece
h lies above any tangent, on a concave one below, and a line differs most from a tangent at an end of the piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STRAIGHT = 1000.0
"""|x| beyond which GELU and SiLU equal 0 or x in every floating-point format. Their formulas give NaN at infinity, and
their derivatives already for large numbers."""
HALVINGS = 30
"""Steps of a bisection."""
ROUNDING, NEAR = 4, 6
"""Lines are moved outward by eps times (``ROUNDING`` max(|x|, 1) + ``NEAR``).

Measured: the roundings of h, slopes and constants need 1.1 |x| at most (float32, three million intervals, checked at 61
points each in float64). The rest covers the kernels' error: up to 2.9 |x| where |x| is about 3, 1.8 |x| elsewhere, by
``scripts/measure_activations.py`` (``KERNEL_ERROR`` in ``entrywise.py``)."""


@dataclass(frozen=True)
class Gate:
    """One function: T, T' and T'', and the ``bend`` up to which h = x T / 2 is convex."""

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    bend: float

    def h(self, x: Tensor) -> Tensor:
        return x * self.value(x) / 2

    def slope(self, x: Tensor) -> Tensor:
        return (self.value(x) + x * self.first(x)) / 2

    def curvature(self, x: Tensor) -> Tensor:
        return self.first(x) + x * self.second(x) / 2

    def tangent(self, place: Tensor, x: Tensor) -> Tensor:
        """The value at ``x`` of h's tangent at ``place``."""
        value, first = self.value(place), self.first(place)
        return (x * value + (x - place) * (place * first)) / 2


SCALE, CUBE = math.sqrt(2 / math.pi), 0.044715


def _near(x: Tensor) -> Tensor:
    return x.clamp(-STRAIGHT, STRAIGHT)  # squares and cubes would overflow


def _erf_first(x: Tensor) -> Tensor:
    return SCALE * torch.exp(-_near(x).square() / 2)


def _inner(x: Tensor) -> Tensor:
    return SCALE * (x + CUBE * x * x * x)


def _rise(x: Tensor) -> Tensor:
    return SCALE * (1 + 3 * CUBE * x * x)


def _square(x: Tensor) -> Tensor:
    """1 - tanh(x)^2, without cancellation."""
    return 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)


def _cubic_first(x: Tensor) -> Tensor:
    x = _near(x)
    return _square(_inner(x)) * _rise(x)


def _cubic_second(x: Tensor) -> Tensor:
    x = _near(x)
    return _square(_inner(x)) * (6 * SCALE * CUBE * x - 2 * torch.tanh(_inner(x)) * _rise(x).square())


GATES = {  # bends by 50-digit arithmetic: roots of the second derivative
    "gelu": Gate(lambda x: torch.erf(x * math.sqrt(0.5)), _erf_first, lambda x: -_near(x) * _erf_first(x), 2**0.5),
    "gelu_tanh": Gate(lambda x: torch.tanh(_inner(_near(x))), _cubic_first, _cubic_second, 1.4185040087908283555),
    "silu": Gate(lambda x: torch.tanh(x / 2), lambda x: _square(x / 2) / 2,
                 lambda x: -torch.tanh(x / 2) * _square(x / 2) / 2, 2.3993572805154676678),
}  # fmt: skip

Line = tuple[Tensor, Tensor]
"""(slope, constant) of a line."""


def gated(gate: Gate, lower: Tensor, upper: Tensor) -> tuple[Line, Line]:
    """The lines below and above the function on [lower, upper], each end (B, *shape).

    Sound on any interval, with ``ROUNDING`` and ``NEAR`` for rounding errors; for infinite or NaN ends they are NaN or
    infinitely far away. Each line has the smallest area among tangents and the chord.
    """
    mirrored = lower + upper < 0
    first, last = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    middle, width = (first + last) / 2, last - first
    wide = width > 0
    chord = torch.where(wide, (gate.h(last) - gate.h(first)) / torch.where(wide, width, 1.0), gate.slope(first))
    lines: list[Line] = []
    for side, place, straight in ((-1, *_below(gate, first, last, middle)), (1, *_above(gate, first, last, middle))):
        slope = torch.where(straight, chord, gate.slope(place))
        touched = torch.where(straight, first, place)
        constant = gate.h(touched) - slope * touched
        with torch.no_grad():
            reach = _least_above if side > 0 else _most_below
            needed = reach(gate, first, last, slope, touched) - constant
            largest = torch.maximum(first.abs(), last.abs())
            spare = torch.finfo(lower.dtype).eps * (ROUNDING * largest.clamp(min=1) + NEAR)
        lines.append((torch.where(mirrored, 0.5 - slope, 0.5 + slope), constant + needed + side * spare))
    return lines[0], lines[1]


def _below(gate: Gate, first: Tensor, last: Tensor, middle: Tensor) -> Line:
    """(place >= 0 in the convex piece whose tangent is below h, bool: take the chord instead).

    A tangent that is below h at ``last`` is below h everywhere left of it: it falls to the left, and h(0) = 0 is h's
    minimum. The further right its place, the higher the tangent is at ``last``.
    """
    with torch.no_grad():
        high = middle.clamp(max=gate.bend)
        touching = _bisected(lambda place: gate.tangent(place, last) <= gate.h(last), torch.zeros_like(high), high)
        straight = first > touching
        touches = touching < high
    place = torch.where(touches, _following(gate, touching, last), middle.clamp(max=gate.bend))
    return place, straight


def _above(gate: Gate, first: Tensor, last: Tensor, middle: Tensor) -> Line:
    """(place in the right concave piece whose tangent is above h, bool: take the chord instead).

    Such a tangent rises while h falls left of -bend, so it is above h on the whole interval if it is so at ``first``.
    The further left its place, the lower the tangent is at ``first``.
    """
    with torch.no_grad():
        low = middle.clamp(min=gate.bend)
        touching = _bisected(lambda place: gate.tangent(place, first) >= gate.h(first), last, low)
        straight = (last <= gate.bend) | (gate.tangent(touching, first) < gate.h(first))
        touches = touching > low
    place = torch.where(touches, _following(gate, touching, first), middle.clamp(min=gate.bend))
    return place, straight


def _bisected(holds: Callable[[Tensor], Tensor], good: Tensor, wanted: Tensor) -> Tensor:
    """``wanted`` where the condition holds there; else, nearly, the last place from ``good`` to ``wanted`` at which it
    holds."""
    at_once, bad = holds(wanted), wanted
    for _ in range(HALVINGS):
        half = (good + bad) / 2
        good_half = holds(half)
        good, bad = torch.where(good_half, half, good), torch.where(good_half, bad, half)
    return torch.where(at_once, wanted, good)


def _following(gate: Gate, place: Tensor, end: Tensor) -> Tensor:
    """``place``, with the gradient (by the implicit function theorem) of the place whose tangent meets h at ``end``."""
    height = gate.tangent(place, end) - gate.h(end)
    with torch.no_grad():
        derivative = gate.curvature(place) * (end - place)
        derivative = torch.where(derivative.abs() > 1e-30, derivative, torch.inf)
    return place - (height - height.detach()) / derivative


def _least_above(gate: Gate, first: Tensor, last: Tensor, slope: Tensor, place: Tensor) -> Tensor:
    """A constant with which a line of this slope is above h, at the ends and on the right concave piece.

    On the left concave piece h falls: its excess over a rising line is largest at ``first``, and over a falling line,
    since h is even, at ``last``.
    """
    at_ends = torch.maximum(gate.h(first) - slope * first, gate.h(last) - slope * last)
    start, point = first.clamp(min=gate.bend), torch.where(place > gate.bend, place, last)
    off = gate.slope(point) - slope
    right = gate.h(point) - slope * point + torch.maximum(off * (start - point), off * (last - point))
    return torch.where(last > gate.bend, torch.maximum(at_ends, right), at_ends)


def _most_below(gate: Gate, first: Tensor, last: Tensor, slope: Tensor, place: Tensor) -> Tensor:
    """A constant with which a line of this slope is below h, at the ends and on the convex piece."""
    at_ends = torch.minimum(gate.h(first) - slope * first, gate.h(last) - slope * last)
    start, end = first.clamp(min=-gate.bend), last.clamp(max=gate.bend)
    point = torch.minimum(torch.maximum(place, start), end)
    off = gate.slope(point) - slope
    inner = gate.h(point) - slope * point + torch.minimum(off * (start - point), off * (end - point))
    return torch.where(first < gate.bend, torch.minimum(at_ends, inner), at_ends)
