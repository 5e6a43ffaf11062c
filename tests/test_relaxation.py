"""Lines enclose their activation, whatever the interval and the slopes asked for."""

import math
from inspect import isabstract

import mpmath
import pytest
import torch
from activation_kinds import by_name, relax
from scalar_functions import ROWS
from torch import Tensor
from walking import walk

from certtrain.bounds import operations
from certtrain.bounds.operations import Entrywise, gates
from certtrain.bounds.operations.gates import GATES
from certtrain.bounds.relaxation import Lines

ACTIVATIONS = {
    "relu": by_name("relu"),
    **{f"leaky_relu {slope}": by_name("leaky_relu", slope) for slope in (0.0, 0.01, 0.5, 1.0)},
    "sigmoid": by_name("sigmoid"),
    "tanh": by_name("tanh"),
    **{kind: by_name(kind) for kind in GATES},
}
KINKED, SMOOTH = list(ACTIVATIONS)[:5], list(ACTIVATIONS)[5:]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def _intervals(count: int = 960) -> tuple[Tensor, Tensor]:
    """Twice as many intervals, (2 · count, 1) each, of all sizes; some end at 0 and some begin there."""
    draw = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)

    def choice(*kinds: Tensor) -> Tensor:
        picked = torch.randint(len(kinds), (1, count), generator=draw)
        return torch.stack(kinds).gather(0, picked)[0]

    zero, far = torch.zeros(count, dtype=torch.float64), torch.tensor([-1e30, -1e15, 1e15, 1e30]).double()
    start = choice(zero, uniform(-5, 5), 10 ** uniform(-12, 4), -(10 ** uniform(-12, 4)), far.repeat(count // 4))
    width = choice(zero, 10 ** uniform(-12, 4))
    below = torch.where(start < 0, -width, -width / 3)
    ends = [(start, start + width), (below, torch.where(start < 0, 0.0, width))]
    lower, upper = (torch.cat(end).unsqueeze(1) for end in zip(*ends, strict=True))
    return lower, upper


INTERVALS = _intervals()
HUGE = [(-1e30, 1e30), (-1e30, 1.0), (-1.0, 1e30), (-1e30, 0.0), (0.0, 1e30), (-1e30, -1e29), (-1e4, 1e-12)]
_START, _POWER = torch.rand(2, 100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MIDDLING = list(zip((11 * _START - 6).tolist(), (10 ** (2.5 * _POWER - 1.5)).tolist(), strict=True))
"""(start, width) of intervals over which the functions bend."""


def samples(lower: Tensor, upper: Tensor) -> Tensor:
    """(B, S) float64 points of each interval: even ones, and ever denser ones towards both ends and 0."""
    even = torch.linspace(0, 1, 301, dtype=torch.float64)
    shares = torch.cat([even, torch.logspace(-16, 0, 65, dtype=torch.float64)])
    near = torch.logspace(-13, 2, 151, dtype=torch.float64)
    lower, upper = lower.double(), upper.double()
    width = upper - lower
    points = [lower + shares * width, upper - shares * width, (near + 0 * lower), (-near + 0 * lower), 0 * lower]
    return torch.minimum(torch.maximum(torch.cat(points, 1), lower), upper)


def gaps(activation: Entrywise, lines: Lines, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At samples (B, S), in float64: how far the function is above the lower and below the upper line; and the
    numbers' size, to which rounding is relative."""
    x = samples(lower, upper)
    value = activation(x)
    zero = torch.zeros_like(lines.upper_intercept)
    intercepts = zero if lines.lower_intercept is None else lines.lower_intercept, lines.upper_intercept
    low, up = (
        (slope.double() * x, intercept.double())
        for slope, intercept in zip((lines.lower_slope, lines.upper_slope), intercepts)
    )
    largest = torch.stack([lower.abs(), upper.abs()]).amax(0).double()
    slopes = torch.maximum(lines.lower_slope.abs(), lines.upper_slope.abs()).double()
    size = slopes * largest + value.abs().amax(1, keepdim=True) + intercepts[1].abs().double()
    return value - sum(low), sum(up) - value, size


def assert_encloses(activation: Entrywise, lines: Lines, lower: Tensor, upper: Tensor) -> None:
    below, above, size = gaps(activation, lines, lower, upper)
    tolerance = 4 * torch.finfo(lower.dtype).eps * size
    assert (below >= -tolerance).all() and (above >= -tolerance).all()


def rise_of(activation: Entrywise, lower: Tensor, upper: Tensor) -> Tensor:
    """(B, 1): the largest of the function's values less the smallest."""
    values = activation(samples(lower, upper))
    return values.amax(1, keepdim=True) - values.amin(1, keepdim=True)


def straight_sides(activation: Entrywise, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Where the function is convex throughout, and where it is concave: the line above, or below, is its chord."""
    if activation.kind in GATES:
        bend = GATES[activation.kind].bend
        return (lower >= -bend) & (upper <= bend), (lower >= bend) | (upper <= -bend)
    return upper <= 0, lower >= 0


def test_every_activation_is_here():
    """Those on the base of curves and the discontinuous ones are held in test_scalar_functions.py."""
    kinds = [kind for kind in vars(operations).values() if isinstance(kind, type) and issubclass(kind, Entrywise)]
    others = {type(row.operation) for row in ROWS.values()}
    kinds = [kind for kind in kinds if kind not in others]
    assert {activation.kind for activation in ACTIVATIONS.values()} == {k.kind for k in kinds if not isabstract(k)}


@pytest.mark.parametrize("name", ACTIVATIONS)
class TestSound:
    def test_on_any_interval(self, name):
        for dtype in (torch.float64, torch.float32):
            lower, upper = (end.to(dtype) for end in INTERVALS)
            assert_encloses(ACTIVATIONS[name], relax(ACTIVATIONS[name], lower, upper), lower, upper)

    @DTYPES
    def test_on_huge_ones(self, name, dtype):
        lower, upper = torch.tensor(HUGE, dtype=dtype).split(1, 1)
        assert_encloses(ACTIVATIONS[name], relax(ACTIVATIONS[name], lower, upper), lower, upper)

    def test_with_any_slope(self, name):
        slopes = torch.rand(INTERVALS[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        slopes[::8], slopes[1::8] = 0.0, 1.0
        slopes[2::4] = 1e6 * (2 * slopes[2::4] - 1)
        for dtype in (torch.float64, torch.float32):
            lower, upper = (end.to(dtype) for end in INTERVALS)
            lines = relax(ACTIVATIONS[name], lower, upper, slopes.to(dtype))
            assert_encloses(ACTIVATIONS[name], lines, lower, upper)

    def test_gradients_are_finite(self, name):
        lower, upper = (end.clone().requires_grad_() for end in INTERVALS)
        alpha = torch.full_like(lower, 0.3).requires_grad_()
        lines = relax(ACTIVATIONS[name], lower, upper, alpha)
        parts = (lines.lower_slope, lines.upper_slope, lines.upper_intercept, lines.lower_intercept)
        total = sum(part.sum() for part in parts if part is not None)
        if not total.requires_grad:  # type: ignore[union-attr]
            return
        for gradient in torch.autograd.grad(total, (lower, upper, alpha), allow_unused=True):  # type: ignore[arg-type]
            assert gradient is None or gradient.isfinite().all()

    def test_of_several_forms(self, name):
        """(B, R, *shape) slopes: each row's lines are those that it would have alone."""
        lower = torch.tensor([[-1.0, -2.0, 0.5], [-3.0, -1.0, -2.0]])
        upper, alpha = lower.abs() + 0.5, torch.rand(2, 4, 3)
        together = relax(ACTIVATIONS[name], lower, upper, alpha)
        for row in range(4):
            alone = relax(ACTIVATIONS[name], lower, upper, alpha[:, row])
            mine = together.lower_slope
            assert torch.equal(mine[:, row] if mine.ndim == 3 else mine, alone.lower_slope)

    def test_a_step_bounds_from_below(self, name):
        """forms · f(x) >= (forms through the lines) · x + constants."""
        torch.manual_seed(0)
        lower = torch.randn(5, 7, dtype=torch.float64)
        upper = lower + 2 * torch.rand_like(lower)
        lines = relax(ACTIVATIONS[name], lower, upper)
        forms = torch.randn(5, 3, 7, dtype=torch.float64)
        (through,), constants = lines.backward(forms, torch.zeros(5, 3, dtype=torch.float64))
        for _ in range(100):
            x = lower + (upper - lower) * torch.rand_like(lower)
            value = (forms * ACTIVATIONS[name](x).unsqueeze(1)).sum(2)
            assert ((through * x.unsqueeze(1)).sum(2) + constants <= value + 1e-12).all()


@pytest.mark.parametrize("name", KINKED)
class TestKinked:
    def test_lines_are_the_tightest(self, name):
        """The upper one is the chord, the lower one goes through the kink; without a kink both are the function."""
        lower, upper = INTERVALS
        activation = ACTIVATIONS[name]
        lines = relax(activation, lower, upper)
        assert lines.lower_intercept is None
        below, above, size = gaps(activation, lines, lower, upper)
        tolerance, x = 4e-16 * size, samples(lower, upper)
        ends = (x == lower) | (x == upper)
        assert (above[ends] <= tolerance.expand_as(above)[ends]).all()
        assert (below[x == 0] == 0).all()
        linear = ((lower >= 0) | (upper <= 0)).flatten()
        assert (below[linear].abs() <= tolerance[linear]).all() and (above[linear].abs() <= tolerance[linear]).all()

    def test_the_lower_line_leaves_the_smaller_area(self, name):
        slope = ACTIVATIONS[name].kink
        lower, upper = torch.tensor([[-1.0, -2.0, -1.0]]), torch.tensor([[2.0, 1.0, 1.0]])
        lines = relax(ACTIVATIONS[name], lower, upper)
        assert torch.equal(lines.lower_slope, torch.tensor([[1.0, slope, slope]]))

    def test_slopes_where_they_are_free(self, name):
        lower, upper = torch.tensor([[-1.0, -2.0, 0.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 2.0]])
        low = ACTIVATIONS[name].kink
        lines = relax(ACTIVATIONS[name], lower, upper, torch.full_like(lower, 0.7))
        assert torch.equal(lines.lower_slope, torch.tensor([[max(0.7, low), low, 1.0, 1.0]]))

    @walk("alpha", [-0.5, 0.0, 0.3, 1.0, 1.5])
    def test_gradients_pass_at_the_ends(self, name, alpha):
        """An ascent starts at 0 or 1, where torch's clamp has no gradient; it must be able to leave."""
        lower, upper = torch.tensor([[-1.0, 0.0]]), torch.tensor([[2.0, 1.0]])
        slopes = torch.full((1, 2), alpha, requires_grad=True)
        (found,) = torch.autograd.grad(relax(ACTIVATIONS[name], lower, upper, slopes).lower_slope.sum(), slopes)
        assert torch.equal(found, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("name", SMOOTH)
class TestSmooth:
    def test_lines_touch(self, name):
        """Each line meets the function; where it is convex (concave) throughout, it is its chord."""
        first, power = torch.rand(2, 1440, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        lower = 14 * first - 8
        upper = lower + 10 ** (3 * power - 2)
        activation = ACTIVATIONS[name]
        below, above, _ = gaps(activation, relax(activation, lower, upper), lower, upper)
        tolerance = 1e-3 * rise_of(activation, lower, upper) + 2e-14
        # a tangent meets the function between samples, 1/300 of the width apart: 1e-3 of the rise covers that
        assert (below.amin(1, keepdim=True) <= tolerance).all() and (above.amin(1, keepdim=True) <= tolerance).all()
        ends = (samples(lower, upper) == lower) | (samples(lower, upper) == upper)
        for gap, chord in zip((above, below), straight_sides(activation, lower, upper)):
            assert (gap <= tolerance)[ends & chord].all()

    @walk("start, width", MIDDLING)
    def test_the_smallest_area(self, name, start, width):
        """Among all sound tangents, and the chord: the line is the lowest in the middle."""
        activation = ACTIVATIONS[name]
        lower, upper = (torch.tensor([[end]], dtype=torch.float64) for end in (start, start + width))
        lines, x = relax(activation, lower, upper), torch.linspace(start, start + width, 401, dtype=torch.float64)
        at = x.clone().requires_grad_()
        value = activation(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
        chord = (value[-1] - value[0]) / width
        slopes, points = torch.cat([slope, chord.reshape(1)]).detach(), torch.cat([x, x[:1]])
        candidates = activation(points).unsqueeze(1) + slopes.unsqueeze(1) * (x - points.unsqueeze(1))
        middle, assured = candidates[:, 200], 1e-12 + 2e-3 * float(rise_of(activation, lower, upper))
        best_above = middle[(candidates >= activation(x) - 1e-12).all(1)].min()
        best_below = middle[(candidates <= activation(x) + 1e-12).all(1)].max()
        assert lines.lower_intercept is not None
        assert lines.upper_slope * x[200] + lines.upper_intercept <= best_above + assured
        assert lines.lower_slope * x[200] + lines.lower_intercept >= best_below - assured

    def test_gradients_are_right(self, name):
        """Tangents move with the ends: against finite differences."""
        lower = torch.tensor([-3.0, -1.0, -0.5, 0.2, 1.0, -2.0, -0.3], dtype=torch.float64).requires_grad_()
        upper = torch.tensor([-1.0, 0.1, 2.0, 0.9, 4.0, 3.0, 0.4], dtype=torch.float64).requires_grad_()

        def parts(lower, upper):
            lines = relax(ACTIVATIONS[name], lower, upper)
            return lines.lower_slope, lines.lower_intercept, lines.upper_slope, lines.upper_intercept

        assert torch.autograd.gradcheck(parts, (lower, upper), eps=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", GATES)
class TestGated:
    """GELU and SiLU, whose lines leave room for their own rounding: without any tolerance."""

    def intervals(self, kind: str, count: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        size = 10 ** (14 * torch.rand(2, count, dtype=torch.float64) - 10)
        near = 4 * torch.randn(count, dtype=torch.float64)
        lower = torch.where(torch.rand(count) < 0.5, near, size[0] * torch.randn(count, dtype=torch.float64).sign())
        width = torch.where(torch.rand(count) < 0.05, 0.0, size[1])
        bend = GATES[kind].bend
        lower[:99], width[:33], width[33:66] = -bend, bend, 2 * bend  # corners of the pieces
        return lower.float(), (lower + width).float()

    def test_float32_lines_enclose_the_exact_function(self, kind):
        """3 million points."""
        lower, upper = self.intervals(kind, 50_000)
        lines, activation = relax(by_name(kind), lower, upper), by_name(kind)
        below, above = (
            (slope.double(), intercept.double())
            for slope, intercept in (
                (lines.lower_slope, lines.lower_intercept), (lines.upper_slope, lines.upper_intercept),
            )
        )  # fmt: skip
        small = torch.logspace(-8, -1, 10, dtype=torch.float64)
        for share in torch.cat([torch.linspace(0, 1, 41, dtype=torch.float64), small, 1 - small]):
            x = lower.double() + share * (upper.double() - lower.double())
            value = activation(x)
            assert (below[0] * x + below[1] <= value).all() and (value <= above[0] * x + above[1]).all()

    def test_float64_lines_by_fifty_digits(self, kind):
        mpmath.mp.dps = 50
        half = {
            "gelu": lambda x: mpmath.erf(x / mpmath.sqrt(2)),
            "gelu_tanh": lambda x: mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3)),
            "silu": lambda x: mpmath.tanh(x / 2),
        }[kind]
        lower, upper = (end[:: len(end) // 200].double() for end in self.intervals(kind, 50_001))
        lines = relax(by_name(kind), lower, upper)
        rows = zip(
            lower.tolist(),
            upper.tolist(),
            *(v.tolist() for v in vars(lines).values() if isinstance(v, Tensor)),
            strict=True,
        )
        for first, last, low, high, high_at_0, low_at_0 in rows:
            for share in (0, 1e-9, 0.1, 0.3, 0.5, 0.8, 1 - 1e-7, 1):
                x = mpmath.mpf(first) + share * (mpmath.mpf(last) - mpmath.mpf(first))
                value = x * (1 + half(x)) / 2
                assert low * x + low_at_0 <= value <= high * x + high_at_0

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
    def test_whatever_bisection_finds_is_made_sound(self, kind, share, monkeypatch):
        """Tangents anywhere on their piece: their constants hold all the same."""
        monkeypatch.setattr(gates, "_bisected", lambda _, good, wanted: wanted + share * (good - wanted))
        lower, upper = (end.double().unsqueeze(1) for end in self.intervals(kind, 3000))
        assert_encloses(by_name(kind), relax(by_name(kind), lower, upper), lower, upper)

    def test_the_constants_of_any_slope(self, kind):
        """Those that soundness rests on: whatever the slope, and wherever it was found."""
        first, last = (end.double() for end in self.intervals(kind, 20_000))
        first, last = torch.where(first + last < 0, -last, first), torch.where(first + last < 0, -first, last)
        slope, share = 4 * torch.rand(len(first), dtype=torch.float64) - 2, torch.rand(len(first), dtype=torch.float64)
        place = first + share * (last - first)
        above = gates._least_above(GATES[kind], first, last, slope, place)
        below = gates._most_below(GATES[kind], first, last, slope, place)
        slack = 4e-16 * 3 * torch.maximum(first.abs(), last.abs())
        for point in torch.linspace(0, 1, 41, dtype=torch.float64):
            x = first + point * (last - first)
            for inside in (x, x.clamp(-6, 6).clamp(first, last)):
                left = GATES[kind].h(inside) - slope * inside
                assert (below - slack <= left).all() and (left <= above + slack).all()

    def test_infinite_ends_and_nan_prove_nothing(self, kind):
        ends = [
            (-math.inf, 1.0),
            (0.0, math.inf),
            (-math.inf, math.inf),
            (math.nan, 1.0),
            (0.0, math.nan),
            (3e38, 3e38),
        ]
        lower, upper = torch.tensor(ends).split(1, 1)
        lines = relax(by_name(kind), lower, upper)
        x = torch.tensor([-1e30, -3.0, -0.7, 0.0, 5.0, 1e30])
        value = by_name(kind)(x)
        assert lines.lower_intercept is not None
        for row, (first, last) in enumerate(ends):
            inside = ~((x < first) | (x > last))
            below, above = (
                (slope[row] * x + intercept[row])[inside]
                for slope, intercept in (
                    (lines.lower_slope, lines.lower_intercept), (lines.upper_slope, lines.upper_intercept),
                )
            )  # fmt: skip
            assert not (below > value[inside]).any() and not (above < value[inside]).any()

    def test_of_a_wide_interval(self, kind):
        """By hand: in the middle the tangent at 0, which is x / 2, from below; the chord from above."""
        lines = relax(by_name(kind), torch.tensor([[-50.0]]), torch.tensor([[50.0]]))
        assert float(lines.lower_slope) == pytest.approx(0.5) and float(lines.lower_intercept) == pytest.approx(
            0, abs=1e-4
        )
        assert float(lines.upper_slope) == pytest.approx(0.5) and float(lines.upper_intercept) == pytest.approx(25)

    def test_of_no_interval(self, kind):
        lines = relax(by_name(kind), torch.zeros(0, 3), torch.zeros(0, 3))
        assert lines.upper_slope.shape == lines.lower_slope.shape == (0, 3)
