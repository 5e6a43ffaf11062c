"""Keyed randomness: a number is a function of its key, and the numbers are uniform, normal and unrelated."""

import math

import pytest
import torch

from certtrain.noise import Noise, key_of, permutation

KINDS = {
    "uniform": lambda noise, stream="": noise.uniform((3, 2), stream),
    "uniform64": lambda noise, stream="": noise.uniform((3, 2), stream, torch.float64),
    "normal": lambda noise, stream="": noise.normal((3, 2), stream),
    "integers": lambda noise, stream="": noise.integers(1000, (3, 2), stream),
}

every_kind = pytest.mark.parametrize("draw", KINDS.values(), ids=KINDS)


def correlation(first, second) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1])


def test_keys_are_stable_and_tell_their_parts_apart():
    assert key_of(0, "noise", 3) == 3351433874384166249  # changing this changes every run of every user
    keys = [key_of(), key_of(0), key_of(1), key_of("1", "2"), key_of("12"), key_of("2", "1"), key_of("a"), key_of(-1)]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)


@every_kind
def test_a_number_depends_on_key_stream_and_position_alone(draw):
    positions = torch.tensor([5, 0, 123_456_789, 7, 3])
    whole = draw(Noise(1, positions))
    assert torch.equal(draw(Noise(1, positions)), whole)
    for row, position in enumerate(positions):  # any batch, any order
        assert torch.equal(draw(Noise(1, position[None]))[0], whole[row])
    assert torch.equal(draw(Noise(1, positions.flip(0))).flip(0), whole)
    torch.rand(3)  # a shared generator plays no part
    assert torch.equal(draw(Noise(1, positions)), whole)


@every_kind
def test_keys_streams_and_positions_give_other_numbers(draw):
    positions = torch.arange(4)
    base = draw(Noise(1, positions))
    others = [draw(Noise(2, positions)), draw(Noise(1, positions), "other"), draw(Noise(1, positions + 1000))]
    others += [base.roll(1, 0), base.roll(1, 1)]  # neighbouring positions and columns
    for other in others:
        assert (other == base).double().mean() < 0.1


@every_kind
def test_a_longer_draw_begins_like_a_shorter_one_and_shapes_do_not_matter(draw):
    noise = Noise(3, torch.arange(6))
    assert torch.equal(noise.uniform((6,)).reshape(6, 3, 2), noise.uniform((3, 2)))
    assert torch.equal(noise.uniform((10,))[:, :6], noise.uniform((6,)))
    assert draw(Noise(3, torch.arange(0))).shape == (0, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_moments_and_range(dtype):
    values = Noise(0, torch.arange(1000)).uniform((200,), dtype=dtype)
    assert values.dtype == dtype and values.shape == (1000, 200)
    assert 0 <= values.min() and values.max() < 1
    count = values.numel()
    for power in (1, 2, 3, 4):
        mean, spread = 1 / (power + 1), math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert float(values.double().pow(power).mean()) == pytest.approx(mean, abs=5 * spread / math.sqrt(count))
    counts = torch.histc(values.float(), bins=64, min=0, max=1)
    chi = float(((counts - count / 64) ** 2 / (count / 64)).sum())
    assert chi < 63 + 5 * math.sqrt(2 * 63)
    steps = values.double() * 2 ** (53 if dtype == torch.float64 else 24)
    assert torch.equal(steps, steps.round())


def test_half_precision_stays_finite():
    for dtype in (torch.bfloat16, torch.float16):
        values = Noise(0, torch.arange(1000)).uniform((100,), dtype=dtype)
        assert torch.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
        assert float(values.double().mean()) == pytest.approx(0.5, abs=0.01)


def test_normal_moments():
    values = Noise(0, torch.arange(1000)).normal((200,), dtype=torch.float64)
    root = math.sqrt(values.numel())
    assert torch.isfinite(values).all()
    assert float(values.mean()) == pytest.approx(0, abs=5 / root)
    assert float(values.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2) / root)
    assert float(values.pow(3).mean()) == pytest.approx(0, abs=5 * math.sqrt(15) / root)
    assert float(values.pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96) / root)
    assert float((values > 2).double().mean()) == pytest.approx(0.02275, abs=5 * 0.15 / root)


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers_cover_their_range_evenly(high):
    values = Noise(0, torch.arange(20_000)).integers(high)
    assert values.dtype == torch.int64 and values.shape == (20_000,)
    counts = torch.bincount(values, minlength=high).double()
    assert len(counts) == high
    chi = float(((counts - 20_000 / high) ** 2 / (20_000 / high)).sum())
    assert chi < high - 1 + 5 * math.sqrt(2 * high)


def test_neighbours_are_unrelated():
    """Next position, next column, next step's key, next seed, next stream."""
    positions = torch.arange(50_000)
    base = Noise(key_of(0, "noise", 0), positions).uniform((2,))
    others = {
        "position": base.roll(1, 0),
        "column": base.flip(1),
        "step": Noise(key_of(0, "noise", 1), positions).uniform((2,)),
        "raw key": Noise(key_of(0, "noise", 0) + 1, positions).uniform((2,)),
        "seed": Noise(key_of(1, "noise", 0), positions).uniform((2,)),
        "stream": Noise(key_of(0, "noise", 0), positions).uniform((2,), "1"),
    }
    for other in others.values():
        assert abs(correlation(base, other)) < 5 / math.sqrt(base.numel())
        assert abs(correlation((base - 0.5).abs(), (other - 0.5).abs())) < 5 / math.sqrt(base.numel())


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_a_permutation_is_one_and_is_keyed(count):
    order = permutation(count, 0, "order", 1)
    assert torch.equal(order.sort().values, torch.arange(count))
    torch.rand(3)
    assert torch.equal(permutation(count, 0, "order", 1), order)
    if count == 1000:
        other = permutation(count, 0, "order", 2)
        assert not torch.equal(other, order)
        assert abs(correlation(order, other)) < 5 / math.sqrt(count)
        assert abs(correlation(order, torch.arange(count))) < 5 / math.sqrt(count)


def test_the_callers_generator_is_left_alone():
    before = torch.get_rng_state()
    noise = Noise(0, torch.arange(4))
    noise.uniform((3,)), noise.normal((3,)), noise.integers(5), permutation(10, 1)
    assert torch.equal(torch.get_rng_state(), before)
