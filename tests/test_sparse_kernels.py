"""Top-k pixels and one sPGD update against oracles of plain Python: sorted lists, one entry at a time."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from walking import walk

from certtrain import kernels

INF, NAN = math.inf, math.nan
EXACT = {"rtol": 1e-12, "atol": 1e-12}
pytestmark = pytest.mark.parametrize("backend", ["cpu", "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def use(backend):
    with kernels.use_backend(backend):
        yield


def uniform(*shape, dtype=torch.float64, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chosen(values: list[float], k: int) -> list[int]:
    """The k first of: NaN, then descending, then by index. Python holds -0 and +0 to be equal."""
    order = sorted(range(len(values)), key=lambda i: (values[i] == values[i], -values[i] if values[i] else 0, i))
    first = set(order[: max(k, 0)])
    return [int(i in first) for i in range(len(values))]


def assert_mask(scores: Tensor, k: int | Tensor):
    found = kernels.topk_mask(scores, k)
    budgets = k.tolist() if isinstance(k, Tensor) else [k] * len(scores)
    expected = [chosen(row.flatten().tolist(), budget) for row, budget in zip(scores, budgets)]
    assert found.dtype == torch.uint8 and found.shape == scores.shape
    assert found.flatten(1).tolist() == expected


ROWS = {
    "random": [0.3, -1.2, 2.5, 0.1, -0.7, 1.9],
    "constant": [1.5] * 6,
    "ascending": [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0],
    "descending": [3.0, 2.0, 1.0, 0.0, -1.0, -2.0],
    "ties": [1.0, 2.0, 1.0, 2.0, 0.0, 2.0],
    "zeros of both signs": [-0.0, 0.0, -1.0, 0.0, -0.0, 1.0],
    "infinities": [-INF, INF, 0.0, INF, -INF, 1.0],
    "nan": [NAN, 1.0, INF, -NAN, NAN, -INF],
    "only nan": [NAN, -NAN] * 3,
    "denormals": [1e-45, -1e-45, 0.0, 1e-40, -1e-40, 1e-45],
    "extremes": [3.4e38, -3.4e38, INF, -INF, 0.0, 1.0],
    "neighbours": [1.0, 1.0 + 2**-23, 1.0 - 2**-24, -1.0, -1.0 - 2**-23, -1.0 + 2**-24],
}


class TestSelection:
    @dtypes
    @walk("row", ROWS)
    def test_order(self, row, dtype):
        for k in range(8):
            assert_mask(torch.tensor([ROWS[row]], dtype=dtype), k)

    @dtypes
    def test_a_budget_for_each_row_is_clamped(self, dtype):
        scores = torch.tensor(list(ROWS.values()), dtype=dtype)
        assert_mask(scores, torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -1, 1 << 40, -(1 << 40), 3]))

    @pytest.mark.parametrize("shape", [(1, 1), (5, 1), (4,), (0, 7), (0,), (3, 0), (0, 0), (2, 3, 4, 5)], ids=str)
    def test_shapes(self, shape):
        scores = normal(*shape)
        for k in (0, 1, 2, 1 << 40):
            found = kernels.topk_mask(scores, k)
            per_row = math.prod(shape[1:])
            assert found.shape == shape and found.dtype == torch.uint8
            assert found.reshape(shape[0], per_row).sum(1).tolist() == [min(k, per_row)] * shape[0]
        assert torch.equal(kernels.topk_mask(scores, torch.full(shape[:1], 2)), kernels.topk_mask(scores, 2))

    def test_strides_carry_no_meaning(self):
        scores = normal(6, 4, 5)
        for odd in (scores.permute(2, 0, 1), scores[::2, :, 1:4], scores[:1].expand(3, 4, 5)):
            assert torch.equal(kernels.topk_mask(odd, 3), kernels.topk_mask(odd.contiguous(), 3))

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
    def test_half_types(self, half):
        with kernels.use_backend(None):
            assert_mask(normal(4, 100, dtype=half), 17)

    @dtypes
    def test_one_more_only_adds(self, dtype):
        scores = normal(3, 50, dtype=dtype)
        masks = [kernels.topk_mask(scores, k) for k in range(51)]
        assert all((more >= less).all() for less, more in itertools.pairwise(masks))

    def test_increasing_maps_and_permutations_of_distinct_scores(self):
        scores, order = normal(3, 200), torch.randperm(200, generator=torch.Generator().manual_seed(1))
        mask = kernels.topk_mask(scores, 20)
        assert torch.equal(kernels.topk_mask(scores.exp(), 20), mask)
        assert torch.equal(kernels.topk_mask(scores * 1e-300, 20), mask)
        assert torch.equal(kernels.topk_mask(scores[:, order], 20), mask[:, order])


def _long(size: int) -> dict[str, Tensor]:
    random, steps = normal(size), torch.arange(size, dtype=torch.float64)
    late = torch.zeros(size, dtype=torch.float64)
    late[-37:] = 1 + uniform(37)
    holes = random.clone()
    holes[::3] = NAN
    return {
        "random": random, "equal": torch.full_like(random, -3.5), "two values": (random > 0.5).double(),
        "quantised": (random * 4).round(), "ascending": steps - size / 2, "descending": size / 2 - steps,
        "only the last ones large": late, "many NaN": holes, "few NaN": torch.where(steps % 999 == 7, NAN, random),
        "infinities": torch.where(random > 2, INF, torch.where(random < -2, -INF, random)),
        "negative": -random.abs() - 1, "large in one stride": torch.where(steps % 50 == 0, steps, 0.0),
    }  # fmt: skip


@dtypes
@pytest.mark.parametrize("size", [4095, 4096, 4097, 9001])
def test_long_rows(size, dtype):
    """From 4096 entries with few to choose, the selection first looks for candidates."""
    rows = torch.stack(list(_long(size).values())).to(dtype)
    for k in (1, 2, 20, size // 16, size // 16 + 1, size - 1):
        assert_mask(rows, k)
    assert_mask(rows, torch.tensor([-1, 0, 1, 2, 7, 20, 100, size // 16, size // 2, size, size + 1, 3]))


extreme = st.sampled_from([0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-45, 3e38, 1.0, 1.0 + 2**-23])


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(extreme | st.floats(width=32, allow_subnormal=True), min_size=1, max_size=40), st.integers(0, 42))
def test_any_row(row, k):
    for dtype in (torch.float32, torch.float64):
        assert_mask(torch.tensor([row, row[::-1]], dtype=dtype), k)


class TestApply:
    @dtypes
    @walk("channels", [1, 3])
    @walk("spatial", [(), (7,), (4, 5)], ids=str)
    def test_selected_pixels_are_added_and_clamped_and_the_others_stay(self, channels, spatial, dtype):
        x, p = uniform(3, channels, *spatial, dtype=dtype), normal(3, channels, *spatial, dtype=dtype)
        x = torch.where(x > 0.9, torch.where(p > 0, 1.0, -0.0), x).to(dtype)
        scores, k = normal(3, *spatial, dtype=dtype), torch.tensor([2, 0, 99])
        images, mask = kernels.sparse_apply(x, p, scores, k)
        assert torch.equal(mask, kernels.topk_mask(scores, k))
        on = mask.bool()[:, None].expand(x.shape)
        integer = torch.int32 if dtype == torch.float32 else torch.int64
        assert torch.equal(images.view(integer)[~on], x.view(integer)[~on])
        assert torch.equal(images[on], (x + p)[on].clamp(0, 1))
        assert images.min() >= 0 and images.max() <= 1

    def test_nothing_and_everything(self):
        x, p, scores = uniform(2, 3, 4, 4), normal(2, 3, 4, 4), normal(2, 4, 4)
        assert torch.equal(kernels.sparse_apply(x, p, scores, 0)[0], x)
        assert torch.equal(kernels.sparse_apply(x, p, scores, 16)[0], (x + p).clamp(0, 1))

    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0), (0, 0, 0)], ids=str)
    def test_empty(self, shape):
        x = torch.zeros(shape, requires_grad=True)
        images, mask = kernels.sparse_apply(x, x, x.sum(1), 2)
        images.sum().backward()
        assert images.shape == shape and mask.shape == (shape[0], *shape[2:])

    def test_pixels_beyond_the_image_box_stay_as_they_are(self):
        x, p = torch.tensor([[[-1.0, NAN, 2.0, -1.0]]]), torch.zeros(1, 1, 4)
        images, _ = kernels.sparse_apply(x, p, torch.tensor([[0.0, 0.0, 0.0, 9.0]]), 1)
        torch.testing.assert_close(images, torch.tensor([[[-1.0, NAN, 2.0, 0.0]]]), equal_nan=True, rtol=0, atol=0)

    @pytest.mark.parametrize("projected", [True, False], ids=["projected", "unprojected"])
    def test_straight_through_gradients(self, projected):
        x, p, scores = (t.requires_grad_() for t in (uniform(2, 3, 4, 5), normal(2, 3, 4, 5), normal(2, 4, 5)))
        onto, k = normal(2, 3, 4, 5, seed=1), torch.tensor([3, 8])
        images, mask = kernels.sparse_apply(x, p, scores, k, projected=projected)
        found = torch.autograd.grad(images, (x, p, scores), onto)
        share = mask.double() if projected else 1 / (1 + (-scores).exp())
        expected = onto, onto * share[:, None], (onto * p).sum(1)
        torch.testing.assert_close(found, expected, **EXACT)

    def test_a_gradient_in_another_layout(self):
        """As the gradient of a convolution in channels_last arrives, or of a sum: without memory of its own."""
        x, p, scores = (t.requires_grad_() for t in (uniform(2, 3, 4, 5), normal(2, 3, 4, 5), normal(2, 4, 5)))
        images, _ = kernels.sparse_apply(x, p, scores, 4)
        onto = normal(2, 3, 4, 5, seed=1)
        for odd in (onto.contiguous(memory_format=torch.channels_last), onto[:1, :1].expand(2, 3, 4, 5)):
            gradients = [
                torch.autograd.grad(images, (x, p, scores), g, retain_graph=True) for g in (odd, odd.contiguous())
            ]
            torch.testing.assert_close(*gradients, **EXACT)


def stepped(gradient, p, m, x, mask, k, alpha, beta, projected):
    """One image, (C, N) and (N,) as lists."""
    channels, pixels = range(len(x)), range(len(m))
    slope = [1 / (1 + math.exp(-v)) / (1 + math.exp(v)) if v == v else NAN for v in m]
    for_mask = [sum(gradient[c][i] * p[c][i] for c in channels) * slope[i] for i in pixels]
    norm = math.sqrt(sum(v * v for v in for_mask))
    if 2e-10 <= norm < INF:
        m = [v + beta * math.sqrt(len(m)) * g / (norm + 1e-10) for v, g in zip(m, for_mask)]
    new_p = [list(row) for row in p]
    for c in channels:
        for i in pixels:
            g = gradient[c][i] if mask[i] or not projected else 0
            value = p[c][i] + alpha * ((g > 0) - (g < 0))
            new_p[c][i] = min(max(min(max(value, -1), 1), -x[c][i]), 1 - x[c][i])
    selected = chosen(m, k)
    images = [[min(max(x[c][i] + new_p[c][i], 0), 1) if selected[i] else x[c][i] for i in pixels] for c in channels]
    return new_p, m, selected, images, selected != mask


def state(batch=3, channels=3, size=(4, 5), dtype=torch.float64):
    x, m = uniform(batch, channels, *size, dtype=dtype), normal(batch, *size, dtype=dtype)
    x[:, :, 0] = (x[:, :, 0] > 0.5).to(dtype)  # pixels on the border of the box
    p = torch.minimum(torch.maximum(2 * uniform(batch, channels, *size, dtype=dtype, seed=1) - 1, -x), 1 - x)
    return normal(batch, channels, *size, dtype=dtype, seed=2), p, m, x, kernels.topk_mask(m, 4)


class TestStep:
    @dtypes
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("projected", [True, False], ids=["projected", "unprojected"])
    def test_against_the_loop(self, projected, channels, dtype):
        given, k = state(channels=channels, dtype=dtype), [4, 0, 11]
        found = kernels.spgd_step(*given, torch.tensor(k), alpha=0.25, beta=0.5, projected=projected)
        flat = [t.flatten(2 if t.ndim == 4 else 1).tolist() for t in given]
        expected = zip(*(stepped(*row, 0.25, 0.5, projected) for row in zip(*flat, k)))
        rounding = EXACT if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
        for part, like, name in zip(found, expected, ("p", "m", "mask", "images", "changed")):
            like = torch.tensor(like, dtype=part.dtype).reshape(part.shape)
            torch.testing.assert_close(part, like, **rounding, msg=lambda text, name=name: f"{name}: {text}")
        assert found[2].dtype == torch.uint8 and found[4].dtype == torch.bool

    def test_changed(self):
        gradient, p, m, x, mask = state()
        gradient[1] = 0  # logits, and so the selection, stay
        found = kernels.spgd_step(gradient, p, m, x, mask, 4, alpha=0.1, beta=50.0, projected=True)
        assert found[4].tolist() == [True, False, True]
        assert found[4].tolist() == (found[2] != mask).flatten(1).any(1).tolist()

    @dtypes
    @walk("value", [0.0, NAN, INF, -INF, 1e-12, "greatest"], ids=str)
    def test_a_row_without_a_direction_keeps_its_logits(self, value, dtype):
        gradient, p, m, x, mask = state(dtype=dtype)
        value = torch.finfo(dtype).max if value == "greatest" else value  # finite, its square is not
        gradient[1] = value if abs(value) < 1 else 0
        gradient[1, 0, 2, 1], p[1, 0, 2, 1] = value, p[1, 0, 2, 1] or 0.5
        given, sizes = (gradient, p, m, x, mask), {"alpha": 0.25, "beta": 0.5, "projected": False}
        found, alone = kernels.spgd_step(*given, 4, **sizes), kernels.spgd_step(*(t[::2] for t in given), 4, **sizes)
        assert torch.equal(found[1][1], m[1])
        for part, like in zip(found, alone):  # and its neighbours do not notice
            assert torch.equal(part[::2], like)

    @dtypes
    @pytest.mark.parametrize("logit", [INF, -INF])
    def test_an_infinite_logit_has_no_slope_and_stops_no_other(self, logit, dtype):
        gradient, p, m, x, mask = state(dtype=dtype)
        m[0, 1, 1] = logit
        found = kernels.spgd_step(gradient, p, m, x, mask, 4, alpha=0.25, beta=0.5, projected=False)[1]
        assert found[0, 1, 1] == logit and (found != m).sum() == m.numel() - 1

    @dtypes
    def test_magnitudes(self, dtype):
        gradient, p, m, x, mask = state(dtype=dtype)
        gradient[0, 0, 1, 1], gradient[0, 1, 1, 2] = NAN, 0.0
        for projected in (True, False):
            moved = kernels.spgd_step(gradient, p, m, x, mask, 4, alpha=1.0, beta=0.5, projected=projected)[0]
            assert (moved >= -x).all() and (moved <= 1 - x).all() and moved.abs().max() <= 1
            still = gradient.isnan() | (gradient == 0) | (torch.tensor(projected) & (mask[:, None] == 0))
            assert torch.equal(moved[still], p[still])
            ends = (x + moved)[~still]
            assert torch.minimum(ends.abs(), (1 - ends).abs()).max() <= 2**-24  # alpha 1 reaches a corner

    def test_shared_directions_and_logits(self):
        given = state()
        both = [kernels.spgd_step(*given, 4, alpha=0.25, beta=0.5, projected=projected) for projected in (True, False)]
        assert torch.equal(both[0][1], both[1][1]) and torch.equal(both[0][2], both[1][2])

    def test_features_instead_of_pixels(self):
        gradient, p, m, x, _ = state(channels=1, size=(60,))
        found = kernels.spgd_step(gradient, p, m, x, kernels.topk_mask(m, 4), 4, alpha=0.1, beta=0.5, projected=True)
        norms = (found[1] - m).square().sum(1).sqrt()
        torch.testing.assert_close(norms, torch.full((3,), 0.5 * math.sqrt(60), dtype=torch.float64))

    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0), (2, 0, 4), (2, 3)], ids=str)
    def test_empty_or_without_spatial_dimensions(self, shape):
        x, m = torch.zeros(shape), torch.zeros(shape[0], *shape[2:])
        found = kernels.spgd_step(x, x, m, x, m.to(torch.uint8), 2, alpha=0.1, beta=0.5, projected=True)
        assert [part.shape for part in found] == [shape, m.shape, m.shape, shape, shape[:1]]

    def test_layouts(self):
        given = state()
        odd = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.mT.contiguous().mT for t in given]
        found, expected = (
            kernels.spgd_step(*tensors, 4, alpha=0.25, beta=0.5, projected=False) for tensors in (odd, given)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_the_same_bits_again_and_nothing_drawn():
    given, before = state(batch=5, size=(64, 65), dtype=torch.float32), torch.random.get_rng_state()
    copies = [t.clone() for t in given]
    first, *others = (kernels.spgd_step(*given, 40, alpha=0.25, beta=0.5, projected=True) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
    assert all(torch.equal(a, b) for a, b in zip(given, copies)), "inputs stay"
    assert torch.equal(before, torch.random.get_rng_state())
    order = [3, 1, 4, 0, 2]
    permuted = kernels.spgd_step(*(t[order] for t in given), 40, alpha=0.25, beta=0.5, projected=True)
    assert all(torch.equal(a, b[order]) for a, b in zip(permuted, first))
