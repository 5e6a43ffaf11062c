"""Epsilon schedules against their closed forms (reference: arXiv 1906.06316's code, exponent 4, middle 1/4)."""

from itertools import pairwise

import pytest
from walking import walk

from certtrain.errors import InputError
from certtrain.training import EpsilonSchedule, Linear, Smoothed, Training

SCHEDULES = [cls for cls in EpsilonSchedule.members().values() if cls.__module__.startswith("certtrain.")]
every_schedule = pytest.mark.parametrize("kind", SCHEDULES, ids=lambda kind: kind.__name__)


def closed_form(p: float) -> float:
    return 256 * p**4 / 13 if p <= 0.25 else (16 * p - 3) / 13


@pytest.mark.parametrize(("start", "length", "per_epoch"), [(1, 20, 235), (2, 80, 391), (3, 1, 4), (1, 2, 10)])
def test_smoothed_is_its_closed_form(start, length, per_epoch):
    schedule = Smoothed(start, length)
    first, ramp = (start - 1) * per_epoch, length * per_epoch
    assert ramp % 4 == 0  # else the bend is rounded down to a step
    for behind in range(ramp + 1):
        assert schedule.fraction(first + behind, per_epoch) == pytest.approx(closed_form(behind / ramp), rel=1e-12)


def test_smoothed_at_published_points():
    """The reference sheet's table."""
    for p, expected in ((0.1, 0.002), (0.25, 1 / 13), (0.5, 0.385), (0.75, 0.692), (1.0, 1.0)):
        assert Smoothed(1, 10).fraction(int(1000 * p), 100) == pytest.approx(expected, abs=5e-4)


def test_smoothed_has_no_corner_where_it_becomes_straight():
    schedule, ramp = Smoothed(1, 1), 400_000
    bend = ramp // 4
    below, at, above = (schedule.fraction(bend + k, ramp) for k in (-1, 0, 1))
    assert at == pytest.approx(1 / 13, rel=1e-12)
    assert (at - below) * ramp == pytest.approx(16 / 13, rel=1e-4)
    assert (above - at) * ramp == pytest.approx(16 / 13, rel=1e-4)


def test_linear_is_its_closed_form():
    """eps / eps_max = ((e - start) + (b - 1) / L) / length in epoch e, batch b, both from 1."""
    schedule, per_epoch = Linear(start=3, length=4), 7
    for epoch in range(1, 10):
        for batch in range(1, per_epoch + 1):
            step = (epoch - 1) * per_epoch + batch - 1
            expected = min(max(((epoch - 3) + (batch - 1) / per_epoch) / 4, 0), 1)
            assert schedule.fraction(step, per_epoch) == pytest.approx(expected)


@every_schedule
@walk("per_epoch", [1, 2, 3, 5, 40])
@walk("length", [1, 2, 3, 7])
@walk("start", [1, 4])
def test_zero_before_one_after_never_falling(kind, per_epoch, length, start):
    schedule = kind(start=start, length=length)
    first, last = (start - 1) * per_epoch, (start - 1 + length) * per_epoch
    values = [schedule.fraction(step, per_epoch) for step in range(last + 5)]
    assert values[: first + 1] == [0.0] * (first + 1)
    assert values[last:] == [1.0] * 5
    assert all(low < high for low, high in pairwise(values[first : last + 1]))
    assert all(0 <= value <= 1 for value in values)
    shares = [schedule.done(step, per_epoch) for step in range(last + 5)]
    assert shares[: first + 1] == [0.0] * (first + 1) and shares[last:] == [1.0] * 5
    assert shares[first : last + 1] == pytest.approx([n / (last - first) for n in range(last - first + 1)])


@every_schedule
def test_no_ramp_means_full_epsilon_from_the_start(kind):
    schedule = kind(start=1, length=0)
    assert [schedule.fraction(step, 10) for step in (0, 1, 50)] == [1.0] * 3
    assert schedule.done(0, 10) == 1.0


@every_schedule
def test_only_the_first_batch_is_clean_when_the_ramp_starts_with_epoch_one(kind):
    schedule = kind(start=1, length=20)
    assert schedule.fraction(0, 235) == 0 < schedule.fraction(1, 235)
    later = kind(start=2, length=80)
    assert later.fraction(391, 391) == 0 < later.fraction(392, 391)


@pytest.mark.parametrize(("exponent", "middle"), [(1.0, 0.5), (2.0, 0.0), (3.5, 0.9), (4.0, 0.001), (300.0, 0.5)])
def test_smoothed_of_any_shape_is_a_ramp(exponent, middle):
    """Steep ones included: 1000 ** 299 is no float."""
    values = [Smoothed(1, 20, exponent, middle).fraction(step, 100) for step in range(2002)]
    assert values[0] == 0 and values[2000:] == [1.0, 1.0] and values[1999] < 1
    assert all(0 <= low <= high for low, high in pairwise(values))


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (Linear, {"start": 0}, "start"),
        (Linear, {"length": -1}, "length"),
        (Smoothed, {"exponent": 0.5}, "exponent"),
        (Smoothed, {"exponent": float("nan")}, "exponent"),
        (Smoothed, {"middle": 1.0}, "middle"),
        (Smoothed, {"middle": -0.1}, "middle"),
    ],
)
def test_refuses(kind, values, field):
    with pytest.raises(InputError, match=f"^{field}: found .*accepted"):
        kind(**values)


def test_a_ramp_ends_within_the_epochs():
    Training(epochs=5, schedule=Linear(start=2, length=4), milestones=())
    with pytest.raises(InputError, match=r"^schedule: .*6.*accepted: at most 5"):
        Training(epochs=5, schedule=Linear(start=2, length=5), milestones=())
