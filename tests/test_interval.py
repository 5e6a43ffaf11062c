"""Intervals hold both of their ends, whatever the rounding."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from walking import walk

from certtrain.bounds import Bounds, Interval

PIXELS = torch.arange(256) / 255
EPSILONS = [0.0, 1e-10, 1 / 255, 2 / 255, 8 / 255, 16 / 255, 0.1, 0.3, 0.5, 1.0, 3.0]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


def assert_holds(interval: Interval, lower, upper):
    """Both ends, in floating point and in exact arithmetic; not wider than rounding asks for."""
    assert (interval.lower <= lower).all() and (interval.upper >= upper).all()
    ends = zip(*(part.flatten().tolist() for part in (interval.center, interval.radius, lower, upper)))
    for center, radius, low, high in ((Fraction(value) for value in row) for row in ends):
        assert center - radius <= low and high <= center + radius
        if low == high:
            assert radius == 0 and center == low
    width = (upper - lower) / 2
    ulp = torch.nextafter(torch.maximum(lower.abs(), upper.abs()), torch.tensor(torch.inf, dtype=lower.dtype))
    ulp = ulp - torch.maximum(lower.abs(), upper.abs())
    assert (interval.radius <= width + 2 * ulp).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e12])
def test_from_bounds_holds_random_boxes(dtype, scale):
    torch.manual_seed(0)
    middle = scale * torch.randn(1000, dtype=dtype)
    width = middle.abs() * 10 ** (-10 * torch.rand(1000, dtype=dtype))  # from an ulp to the number itself
    lower = middle - width
    upper = torch.maximum(middle + width, lower)
    assert_holds(Interval.from_bounds(lower, upper), lower, upper)


@given(finite, finite)
@example(0.0, 1.401298464324817e-45)  # the smallest numbers have no half
@example(-1.401298464324817e-45, 1.401298464324817e-45)
@example(1.0, 1.0000001192092896)  # neighbours: no float lies between
@example(-(2.0**100), 1.0)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_from_bounds_holds_any_two_floats(first, second):
    lower, upper = torch.tensor([min(first, second)]), torch.tensor([max(first, second)])
    found = Interval.from_bounds(lower, upper)
    assert found.lower <= lower and found.upper >= upper
    center, radius = Fraction(found.center.item()), Fraction(found.radius.item())
    assert center - radius <= Fraction(lower.item()) and Fraction(upper.item()) <= center + radius
    assert (radius == 0) == (lower.item() == upper.item())


@walk("epsilon", EPSILONS)
@walk("as_tensor", [False, True])
def test_box_of_every_pixel(epsilon, as_tensor):
    given = torch.tensor(epsilon) if as_tensor else epsilon
    lower, upper = (PIXELS - given).clamp(min=0), (PIXELS + given).clamp(max=1)
    assert_holds(Interval.box(PIXELS, given), lower, upper)
    for ours, theirs in zip(
        (Interval.box(PIXELS, given).center, Interval.box(PIXELS, given).radius),
        (Interval.from_bounds(lower, upper).center, Interval.from_bounds(lower, upper).radius),
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_box_holds_every_float_of_the_exact_ball(epsilon):
    """x - epsilon itself is rounded; rounding is monotone, so that no float of the real ball falls out."""
    radius, box = Fraction(torch.tensor(epsilon).item()), Interval.box(PIXELS, epsilon)
    for index, pixel in enumerate(PIXELS.tolist()):
        for sign in (-1, 1):
            end = min(max(Fraction(pixel) + sign * radius, Fraction(0)), Fraction(1))
            corner = torch.tensor(float(end))  # rounded to float64, then to float32
            if sign * (Fraction(corner.item()) - end) > 0:
                corner = torch.nextafter(corner, torch.tensor(0.5) if end == 0 else torch.tensor(-sign * torch.inf))
            assert abs(Fraction(corner.item()) - Fraction(pixel)) <= radius  # the outermost float of the ball
            assert box.lower[index] <= corner <= box.upper[index]


def test_box_of_epsilon_zero_is_the_image():
    box = Interval.box(PIXELS, 0.0)
    assert torch.equal(box.center, PIXELS) and (box.radius == 0).all()


def test_box_keeps_shape_and_dtype():
    for images in (torch.rand(0, 3, 4, 4), torch.rand(2, 3, dtype=torch.float64)):
        box = Interval.box(images, 0.1)
        assert box.center.shape == box.radius.shape == images.shape
        assert box.center.dtype == box.radius.dtype == images.dtype


def test_gradients_are_those_of_the_plain_form():
    lower = torch.tensor([0.0, 0.25, -1.0], dtype=torch.float64, requires_grad=True)
    upper = torch.tensor([0.1, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    found = Interval.from_bounds(lower, upper)
    for part, signs in ((found.center, (0.5, 0.5)), (found.radius, (-0.5, 0.5))):
        gradients = torch.autograd.grad(part.sum(), (lower, upper), retain_graph=True)
        assert [gradient.unique().tolist() for gradient in gradients] == [[sign] for sign in signs]


def test_point_and_contains():
    point = Interval.point(PIXELS)
    assert point.contains(PIXELS).all() and (point.radius == 0).all()
    assert not point.contains(PIXELS + 1e-3).any() and point.contains(PIXELS + 1e-3, slack=2e-3).all()
    assert not point.contains(torch.full_like(PIXELS, torch.nan)).any()


def test_map_takes_both_parts_along():
    box = Interval.box(torch.rand(2, 3, 4), 0.1)
    found = box.map(lambda part: part.flatten(1))
    assert torch.equal(found.lower, box.lower.flatten(1)) and torch.equal(found.upper, box.upper.flatten(1))


class TestBounds:
    def test_intersect_takes_the_tighter_end(self):
        first = Bounds(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 3.0]))
        second = Bounds(torch.tensor([0.5, -2.0]), torch.tensor([2.0, 2.0]))
        for found in (first.intersect(second), second.intersect(first)):
            assert found.lower.tolist() == [0.5, -1.0] and found.upper.tolist() == [1.0, 2.0]

    def test_intersect_keeps_common_points_and_is_idempotent(self):
        torch.manual_seed(0)
        value = torch.randn(50)
        first, second = (Bounds(value - torch.rand(50), value + torch.rand(50)) for _ in range(2))
        found = first.intersect(second)
        assert (found.lower <= value).all() and (value <= found.upper).all()
        again = found.intersect(first)
        assert torch.equal(again.lower, found.lower) and torch.equal(again.upper, found.upper)

    def test_there_and_back_only_widens(self):
        bounds = Interval.box(PIXELS, 8 / 255).bounds()
        back = bounds.interval().bounds()
        assert (back.lower <= bounds.lower).all() and (back.upper >= bounds.upper).all()
