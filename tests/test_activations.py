"""GELU and SiLU, which fall before they rise: images of intervals, gradients, and what is trained and certified with
them; together with concatenations and with convolutions of sequences."""

import math

import mpmath
import pytest
import torch
from activation_kinds import TROUGHS, by_name
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Joined
from torch import Tensor, nn

import certtrain
from certtrain.bounds import Bounds, Interval, compute_bounds, compute_margins
from certtrain.bounds.folding import fold
from certtrain.bounds.operations.gates import GATES, STRAIGHT
from certtrain.bounds.relaxation import InputLines
from certtrain.errors import InputError
from certtrain.verifiers import Certify

KINDS = pytest.mark.parametrize("kind", TROUGHS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
LAYERS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU()}
properties = settings(deadline=None, max_examples=150, derandomize=True, database=None)


def exact(kind: str, x):
    """To fifty digits, from the definitions."""
    x, one = mpmath.mpf(x), mpmath.mpf(1)
    match kind:
        case "gelu":
            return x * mpmath.ncdf(x)
        case "gelu_tanh":
            return x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)))
    return x / (one + mpmath.exp(-x))


@pytest.fixture(autouse=True)
def fifty_digits():
    with mpmath.workdps(50):
        yield


@KINDS
class TestConstants:
    def test_the_minimum(self, kind):
        trough = TROUGHS[kind]
        place = mpmath.findroot(lambda x: mpmath.diff(lambda y: exact(kind, y), x), trough.place)
        assert float(place) == trough.place and float(exact(kind, place)) == trough.value
        assert math.nextafter(trough.place, -math.inf) < place < math.nextafter(trough.place, math.inf)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert float(torch.tensor(trough.below(dtype), dtype=dtype)) < exact(kind, place)

    def test_it_falls_up_to_there_and_rises_from_there(self, kind):
        for distance in (1e-9, 1e-4, *(k / 8 for k in range(1, 36))):
            for sign in (-1, 1):
                x = TROUGHS[kind].place + sign * distance
                assert mpmath.sign(mpmath.diff(lambda y: exact(kind, y), x)) == sign

    def test_where_it_bends(self, kind):
        bend, second = GATES[kind].bend, lambda x: mpmath.diff(lambda y: exact(kind, y), x, 2)
        assert float(mpmath.findroot(second, bend)) == pytest.approx(bend, rel=1e-15)
        for x in (k / 8 for k in range(-36, 37)):
            assert mpmath.sign(second(x)) == (1 if abs(x) < bend else -1)

    def test_torch_does_not_fall_below_the_bound(self, kind):
        """Among the numbers next to the minimum, where torch's own rounding may go below it."""
        place, activation = TROUGHS[kind].place, by_name(kind)
        for dtype, width in ((torch.float32, 0.02), (torch.float64, 1e-6)):
            x = torch.linspace(place - width, place + width, 1_000_001, dtype=torch.float64).to(dtype)
            assert float(activation(x).min()) >= TROUGHS[kind].below(dtype)


STARTS = st.one_of(st.floats(-6, 4), st.floats(-2, -0.5), st.floats(-10, 6).map(lambda power: -(10**power)))
WIDTHS = st.one_of(st.just(0.0), st.floats(-9, 6).map(lambda power: 10**power), st.floats(0, 3))


@KINDS
class TestImages:
    @DTYPES
    @given(st.lists(st.tuples(STARTS, WIDTHS), min_size=8, max_size=8))
    @properties
    def test_hold_every_value_and_no_more(self, kind, dtype, ends):
        lower, upper = (torch.tensor(end, dtype=dtype) for end in zip(*((a, a + w) for a, w in ends)))
        found, activation = by_name(kind).image(Bounds(lower, upper)), by_name(kind)
        shares = torch.cat([torch.linspace(0, 1, 401), torch.logspace(-12, 0, 60)]).double().unsqueeze(1)
        x = lower.double() + shares * (upper.double() - lower.double())
        x = torch.cat([x, torch.full_like(x[:1], TROUGHS[kind].place)]).clamp(lower.double(), upper.double())
        values, largest, finfo = activation(x), torch.maximum(lower.abs(), upper.abs()), torch.finfo(dtype)
        # torch's vectorised GELU of float32 is off by up to 3.2 eps |x|; half of the least subnormal number becomes 0
        rounding = 4 * finfo.eps * largest + finfo.smallest_normal
        assert found.lower.dtype == dtype
        assert (found.lower - rounding <= values).all() and (values <= found.upper + rounding).all()
        assert (found.lower >= values.amin(0) - 2 * rounding).all()
        assert (found.upper <= values.amax(0) + 2 * rounding).all()

    @DTYPES
    def test_next_to_the_minimum(self, kind, dtype):
        """Of all pairs of neighbouring numbers around it: those with the minimum between them have it rounded down."""
        place = torch.tensor(TROUGHS[kind].place, dtype=dtype)
        numbers = [place]
        for _ in range(3):
            numbers = [torch.nextafter(numbers[0], -place.new_tensor(math.inf)), *numbers,
                       torch.nextafter(numbers[-1], place.new_tensor(math.inf))]  # fmt: skip
        least = exact(kind, mpmath.findroot(lambda x: mpmath.diff(lambda y: exact(kind, y), x), TROUGHS[kind].place))
        inside = 0
        for first in range(len(numbers)):
            for last in range(first, len(numbers)):
                lower = by_name(kind).image(Bounds(numbers[first], numbers[last])).lower
                if float(numbers[first]) <= TROUGHS[kind].place <= float(numbers[last]) and first < last:
                    inside += 1
                    assert float(lower) < least
        assert inside >= 9

    @DTYPES
    def test_infinite_ends(self, kind, dtype):
        lower = torch.tensor([-math.inf, -math.inf, -math.inf, 2.0, -math.inf], dtype=dtype)
        upper = torch.tensor([math.inf, -3.0, 0.0, math.inf, -math.inf], dtype=dtype)
        found, activation = by_name(kind).image(Bounds(lower, upper)), by_name(kind)
        least, point = TROUGHS[kind].below(dtype), torch.tensor([-3.0, 2.0], dtype=dtype)
        low, high = activation(point).tolist()
        assert found.lower.tolist() == pytest.approx([least, low, least, high, 0])
        assert found.upper.tolist() == [math.inf, 0, 0, math.inf, 0]

    def test_nan_stays(self, kind):
        ends = torch.tensor([math.nan, 0.0, math.nan]), torch.tensor([1.0, math.nan, math.nan])
        found = by_name(kind).image(Bounds(*ends))
        assert found.lower.isnan().tolist() == [True, True, True] and found.upper.isnan().all()

    @DTYPES
    def test_beyond_its_formula_it_is_straight(self, kind, dtype):
        """Up to there, the two agree: x above, 0 below."""
        x = torch.tensor([STRAIGHT, 0.5 * STRAIGHT], dtype=dtype)
        assert torch.equal(by_name(kind)(x), x)
        assert float(by_name(kind)(-x).abs().max()) < 1e-100

    def test_gradients(self, kind):
        """To the end where a bound is attained; none to the minimum; at ends that are one number, to both."""
        lower = torch.tensor([-4.0, -3.0, -2.0, 0.5, -9.0, 1.0, -1e30, 2.0], dtype=torch.float64).requires_grad_()
        upper = torch.tensor([-3.0, 0.1, 5.0, 1.0, -8.0, 1.0, 1e30, 1e30], dtype=torch.float64).requires_grad_()
        found, slope = by_name(kind).image(Bounds(lower, upper)), GATES[kind].slope
        at_lower, at_upper = (0.5 + slope(end.detach()) for end in (lower, upper))
        of_lower = torch.autograd.grad(found.lower.sum(), (lower, upper), retain_graph=True)
        of_upper = torch.autograd.grad(found.upper.sum(), (lower, upper))
        takes = torch.tensor([[0, 0, 0, 1, 0, 0.5, 0, 1], [1, 0, 0, 0, 1, 0.5, 0, 0],
                              [1, 0, 0, 0, 1, 0.5, 0, 0], [0, 1, 1, 1, 0, 0.5, 1, 1]], dtype=torch.float64)  # fmt: skip
        for gradient, share, own in zip((*of_lower, *of_upper), takes, (at_lower, at_upper) * 2):
            torch.testing.assert_close(gradient, share * own, rtol=1e-9, atol=1e-12)

    def test_gradients_of_huge_numbers_are_finite(self, kind):
        for size in (1e3, 1e10, 1e38):
            for lower, upper in ((-size, size), (-size, -size / 2), (size / 2, size)):
                ends = [torch.tensor([end], requires_grad=True) for end in (lower, upper)]
                found = by_name(kind).image(Bounds(*ends))
                assert all(g.isfinite().all() for g in torch.autograd.grad((found.lower + found.upper).sum(), ends))

    def test_one_layer_by_hand(self, kind):
        """[-1.5, 3] holds the minimum; [1, 2] does not."""
        model, box = nn.Sequential(LAYERS[kind]), Interval.from_bounds(*torch.tensor([[[-1.5, 1.0]], [[3.0, 2.0]]]))
        found, expected = compute_bounds(model, box), LAYERS[kind](torch.tensor([3.0, 1.0, 2.0]))
        assert found.lower[0].tolist() == pytest.approx([TROUGHS[kind].value, float(expected[1])], abs=5e-6)
        assert found.upper[0].tolist() == pytest.approx([float(expected[0]), float(expected[2])], abs=5e-6)
        assert float(found.lower[0, 0]) < TROUGHS[kind].value


@KINDS
def test_forward_lines_may_fall(kind):
    """Where the function falls, its lower line takes the upper line of what comes before."""
    torch.manual_seed(0)
    slopes, gap = torch.randn(50, 2, 7, dtype=torch.float64) / 4, torch.rand(50, 1, 7, dtype=torch.float64)
    middle = torch.tensor([-3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 2.0], dtype=torch.float64).expand(50, 1, 7)
    lower, upper = torch.cat([slopes, middle - gap], 1), torch.cat([slopes, middle + gap], 1)
    x = InputLines(lower, upper)
    found = by_name(kind).relax(x.bounds()).forward(x)
    for _ in range(200):
        at = torch.cat([2 * torch.rand(50, 2, 1, dtype=torch.float64) - 1, torch.ones(50, 1, 1)], 1)
        low, high = (lower * at).sum(1), (upper * at).sum(1)
        value = by_name(kind)(low + torch.rand_like(low).round() * (high - low))
        assert ((found.lower * at).sum(1) <= value + 1e-12).all()
        assert (value <= (found.upper * at).sum(1) + 1e-12).all()


def sequences(activation: nn.Module) -> nn.Module:
    """(B, 1, 12) → (B, 3): everything that is new together."""
    return nn.Sequential(
        nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), activation, Joined(nn.Conv1d(4, 2, 1)), nn.MaxPool1d(2),
        nn.Conv1d(6, 4, 3, padding="same"), activation, nn.AvgPool1d(2), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


@KINDS
def test_it_trains_by_intervals(kind):
    """Forty steps on three patterns: every margin is certified, and the gradients were finite."""
    torch.manual_seed(0)
    model, images = sequences(LAYERS[kind]), torch.eye(3).repeat_interleave(4, 1).unsqueeze(1)
    labels, ascent = torch.arange(3), torch.optim.Adam(model.parameters(), 0.02)
    box = Interval.box(images, 0.02)
    before = compute_margins(model.eval(), box, labels)[0]
    for _ in range(40):
        margins = compute_margins(model, box, labels, certtrain.bounds.forward(model.train(), images).statistics)[0]
        ascent.zero_grad()
        nn.functional.softplus(-margins).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        ascent.step()
    after = compute_margins(model.eval(), box, labels)[0]
    assert not (before > 0).all() and (after > 0).all()


def planar(activation: nn.Module) -> nn.Module:
    """(B, 1, 1, 2) → (B, 3), of which each class wins somewhere."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(2, 12), activation, Joined(nn.Linear(12, 4)), nn.Linear(16, 8), activation,
        nn.Linear(8, 3),
    ).requires_grad_(False).eval()  # fmt: skip
    model[1].weight *= 5
    model[-1].bias -= model(grid(torch.full((1, 1, 2), 0.5), 0.5)).mean(0)
    return model


def grid(image: Tensor, epsilon: float, count: int = 81) -> Tensor:
    """(count², *shape): even points of the box, borders included."""
    steps = torch.linspace(-epsilon, epsilon, count)
    return (image + torch.cartesian_prod(steps, steps).reshape(-1, 1, 1, 2)).clamp(0, 1)


@KINDS
def test_verdicts_are_never_wrong(kind):
    """Against every point of a grid, at radii from safe to hopeless; whichever stage decides."""
    model, images = planar(LAYERS[kind]), torch.rand(6, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    labels, seen = model(images).argmax(1), []
    settings = Certify(stages=("ibp", "crown_ibp", "attack", "crown", "alpha", "input_split"), timeout=10.0)
    for epsilon in (0.005, 0.05, 0.3):
        verdicts = certtrain.certify(model, images, labels, epsilon, settings)
        for verdict, image, label in zip(verdicts, images, labels):
            wrong = model(grid(image, epsilon)).argmax(1) != label
            seen.append(verdict.status)
            assert verdict.status in ("verified", "falsified")
            assert not (verdict.status == "verified" and wrong.any())
            if verdict.status == "falsified":
                assert verdict.counterexample is not None
                assert model(verdict.counterexample[None]).argmax(1) != label
                assert ((verdict.counterexample - image).abs() <= epsilon + 1e-6).all()
    assert {"verified", "falsified"} == set(seen)


@KINDS
def test_what_takes_no_smooth_functions_says_so(kind):
    model, images = planar(LAYERS[kind]), torch.rand(1, 1, 1, 2)
    assert not fold(model, images.shape[1:]).piecewise_linear
    with pytest.raises(InputError, match=f"found {kind}; accepted in this arithmetic: relu, leaky_relu"):
        certtrain.certify(model, images, torch.tensor([0]), 0.1, Certify(arithmetic="float32"))
