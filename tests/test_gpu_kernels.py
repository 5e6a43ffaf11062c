"""Triton's kernels against the plain formulas in float64: on a GPU (``-m gpu``), elsewhere in Triton's interpreter."""

from itertools import product

import pytest
import torch
from torch import Tensor
from walking import pairs, walk

from certtrain import kernels
from certtrain.kernels import reference

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = walk("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
LAYOUTS = "contiguous", "channels_last", "strided"


def rows(*axes):
    """All of the axes' product on a GPU; where programs are interpreted, one row for each two values of two axes."""
    return list(product(*axes)) if ON_GPU else pairs(*axes)


@pytest.fixture(autouse=True)
def gpu_backend():
    with kernels.use_backend("gpu"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What is not written shows up as NaN."""
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


def randn(*shape, dtype=torch.float64, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def rand(*shape, dtype=torch.float64, seed=0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and x.ndim == 4 else x


def compare(
    op, inputs: list[Tensor | None], tolerance: float, formula=None, differentiable: slice = slice(None)
) -> None:
    """Outputs and all gradients, relative to the largest entry; ``formula`` is computed in float64."""
    sides = []
    for function, wide in ((op, False), (formula or getattr(reference, op.__name__), True)):
        leaves = [None if t is None else (t.double() if wide else t).detach().requires_grad_() for t in inputs]
        found = function(*leaves)
        found = [found] if isinstance(found, Tensor) else list(found)
        weights = [randn(*t.shape, dtype=t.dtype, seed=9 + i) for i, t in enumerate(found)]
        sources = [t for t in leaves if t is not None]
        grads = torch.autograd.grad(found[differentiable], sources, weights[differentiable], allow_unused=True)
        sides.append([*found, *(torch.zeros_like(s) if g is None else g for g, s in zip(grads, sources))])
    for ours, expected in zip(*sides, strict=True):
        assert ours.shape == expected.shape and not ours.isnan().any()
        if expected.numel():
            error = (ours.detach().double() - expected.detach()).abs().max()
            assert error <= tolerance * max(1.0, float(expected.detach().abs().max())), op


SHAPES = [(3, 5), (2, 4, 7, 5), (6, 3, 1, 1), (2, 3, 9), (0, 3), (2, 70, 3), (5, 130)]


class TestPointwise:
    @walk("shape, layout, dtype", rows(SHAPES, LAYOUTS, TOLERANCE))
    def test_relu(self, shape, layout, dtype):
        center, radius = laid_out(randn(*shape, dtype=dtype), layout), rand(*shape, dtype=dtype, seed=1)
        compare(kernels.ibp_relu, [center, radius], TOLERANCE[dtype])

    @walk("shape, relu, layout, dtype", rows(SHAPES, [False, True], LAYOUTS, TOLERANCE))
    def test_affine(self, shape, relu, layout, dtype):
        center, radius = laid_out(randn(*shape, dtype=dtype), layout), rand(*shape, dtype=dtype, seed=1)
        scale, shift = randn(shape[1], dtype=dtype, seed=2), randn(shape[1], dtype=dtype, seed=3)
        compare(
            lambda *t: kernels.ibp_affine(*t, relu=relu), [center, radius, scale, shift], 4 * TOLERANCE[dtype],
            lambda *t: reference.ibp_affine(*t, relu=relu),
        )  # fmt: skip

    @walk(
        "shape, layout, dtype, affine",
        rows(
            [(3, 5), (2, 4, 7, 5), (6, 3, 1, 1), (40, 3, 7, 9), (300, 5), (5, 130)], LAYOUTS, TOLERANCE, [True, False]
        ),
    )
    def test_batch_norm(self, shape, layout, dtype, affine):
        x = laid_out((randn(*shape) * 2 + 1).to(dtype), layout)
        vectors = [randn(shape[1], dtype=dtype, seed=seed) if affine else None for seed in (1, 2)]
        compare(
            lambda *t: kernels.batch_statistics_norm(*t, 0.1), [x, *vectors], 20 * TOLERANCE[dtype],
            lambda *t: reference.batch_statistics_norm(*t, 0.1),
        )  # fmt: skip

    def test_batch_norm_with_a_large_mean(self):
        """A sum of squares would lose all digits of the variance."""
        x = (randn(64, 3, 5, 5) + 1e4).float()
        _, mean, variance = kernels.batch_statistics_norm(x, None, None, 1e-5)
        exact = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(variance.double(), exact[0], rtol=1e-3, atol=0)
        torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=0)

    def test_nan_survives(self):
        nan = torch.tensor([float("nan"), 1.0, -1.0], device=DEVICE)
        center, _ = kernels.ibp_relu(nan, torch.zeros_like(nan))
        assert center.isnan().tolist() == [True, False, False]

    def test_zero_radius_stays_exactly_zero(self):
        center, scale = randn(3, 4, 5, 5, dtype=torch.float32), randn(4, dtype=torch.float32)
        zero = torch.zeros_like(center)
        for _, radius in (kernels.ibp_relu(center, zero), kernels.ibp_affine(center, zero, scale, scale, relu=True)):
            assert (radius == 0).all()


class TestLayers:
    """The products are the vendor's: what is under test is what follows them."""

    @DTYPES
    @pytest.mark.parametrize("folded", [False, True])
    def test_linear(self, folded, dtype):
        center, radius = randn(6, 5, dtype=dtype), rand(6, 5, dtype=dtype, seed=1)
        weight, *vectors = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(7, 5), (7,), (7,), (7,)], 2))
        vectors = vectors if folded else [vectors[0], None, None]

        def through(ops):
            return lambda c, r, w, b, *rest: ops.ibp_linear(
                c, r, w, b, **dict(zip(("scale", "shift"), rest or (None, None))), relu=True
            )

        compare(through(kernels), [center, radius, weight, *vectors], 8 * TOLERANCE[dtype], through(reference))

    @walk("layout, dtype", product(LAYOUTS, TOLERANCE))
    def test_conv(self, layout, dtype):
        center, radius = randn(2, 4, 7, 5, dtype=dtype), rand(2, 4, 7, 5, dtype=dtype, seed=1)
        weight, bias = randn(6, 2, 3, 3, dtype=dtype, seed=2), randn(6, dtype=dtype, seed=3)

        def through(ops):
            return lambda *t: ops.ibp_conv2d(*t, stride=2, padding=1, groups=2, relu=True)

        inputs = [laid_out(center, layout), laid_out(radius, layout), weight, bias]
        compare(through(kernels), inputs, 20 * TOLERANCE[dtype], through(reference))


@walk(
    "shape, dtype, biased",
    rows([(5, 4, 7), (1, 2, 1), (3, 40, 33), (0, 3, 4), (4, 1, 3), (20, 70, 5)], TOLERANCE, [True, False]),
)
def test_margins(shape, dtype, biased):
    images, classes, features = shape
    labels = torch.arange(images, device=DEVICE) * 7 % classes
    inputs = [
        randn(images, features, dtype=dtype), rand(images, features, dtype=dtype, seed=1),
        randn(classes, features, dtype=dtype, seed=2), randn(classes, dtype=dtype, seed=3) if biased else None,
    ]  # fmt: skip
    compare(
        lambda *t: kernels.ibp_margins(*t, labels), inputs, 10 * TOLERANCE[dtype],
        lambda *t: reference.ibp_margins(*t, labels),
    )  # fmt: skip


@walk(
    "shape, upper, dtype, own",
    rows(
        [(2, 3, 7), (1, 5, 1500), (0, 2, 3), (3, 1, 1), (2, 4, 3, 5)], [False, True], TOLERANCE,
        [(False, False, False), (True, False, True), (False, True, False)],
    ),
)  # fmt: skip
def test_crown(shape, upper, dtype, own):
    batch, forms, *rest = shape
    coefficients = randn(*shape, dtype=dtype)
    coefficients.view(-1)[::3] = 0
    bias = randn(batch, forms, dtype=dtype, seed=1)
    lines = [rand(*(shape if each else (batch, *rest)), dtype=dtype, seed=3 if each else 2) for each in own]
    compare(
        lambda *t: kernels.crown_relu_step(*t, upper=upper), [coefficients, bias, *lines], 100 * TOLERANCE[dtype],
        lambda *t: reference.crown_relu_step(*t, upper=upper),
    )  # fmt: skip


@walk(
    "shape, layout, dtype",
    rows([(5, 7, 3, 6), (3, 1100, 2, 1), (4, 300, 3, 5), (2, 1, 1, 2), (2, 0, 2, 3)], LAYOUTS, TOLERANCE),
)
def test_cut_box_minima(shape, layout, dtype):
    count, entries, items, each = shape
    forms = laid_out(randn(count, entries, dtype=dtype), layout)
    constants, cuts = randn(count, dtype=dtype, seed=1), laid_out(randn(items, entries, dtype=dtype, seed=2), layout)
    offsets = cuts.abs().sum(1) * torch.linspace(-0.1, 0.6, items, device=DEVICE, dtype=dtype)
    chosen = (torch.arange(items * each, device=DEVICE) * 5 % (count + 1) - 1).reshape(items, each)
    found = kernels.cut_box_minima(forms, constants, cuts, offsets, chosen)
    given = [t.double() for t in (forms, constants, cuts, offsets)]
    expected = reference.cut_box_minima(*given, chosen)
    assert found.dtype == dtype and torch.equal(found == -torch.inf, chosen < 0)
    tolerance = 4 * TOLERANCE[dtype] * (1 + float(given[0].abs().sum(1).max()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@DTYPES
def test_cut_box_minima_of_numbers_that_are_not_finite(dtype):
    forms = torch.tensor([[1.0, 2], [torch.nan, 0], [torch.inf, 0], [1, -1]]).to(DEVICE, dtype)
    constants = torch.tensor([1.0, 1, 1, torch.inf]).to(DEVICE, dtype)
    cuts = torch.tensor([[1.0, 1], [torch.nan, 1], [torch.inf, 1], [0, 0], [1, 1], [1, 1]]).to(DEVICE, dtype)
    offsets = torch.tensor([0.0, 0, 0, 1, torch.inf, torch.nan]).to(DEVICE, dtype)
    found = kernels.cut_box_minima(forms, constants, cuts, offsets, torch.arange(4, device=DEVICE).expand(6, 4))
    assert (found[:, 1:] == -torch.inf).all() and (found[:, 0] == -2).all()


def awkward_rows(entries: int, dtype: torch.dtype) -> Tensor:
    """Random; rounded to many ties; all equal; signed zeros; NaN and infinities; ascending."""
    rows = randn(6, entries, dtype=dtype)
    rows[1] = rows[1].round()
    rows[2] = 1
    rows[3] = torch.where(rows[3] > 0, 0.0, -0.0)
    rows[4, ::3], rows[4, 1::5], rows[4, 2::7] = float("nan"), float("inf"), -float("inf")
    rows[5] = torch.arange(entries, device=DEVICE) / entries
    return rows


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHORT = [(1, F32), (2, F64), (49, F16), (49, BF16), (49, F32), (49, F64), (1023, F64), (1024, F32)]
LONG = [(0, F64), (7, F32), (7, F64), (4097, F64), (8999, F32)]
if ON_GPU:
    SHORT, LONG = product([1, 2, 49, 1023, 1024], TOLERANCE), product([0, 7, 4097, 8999], [F32, F64])


class TestSelection:
    @walk("entries, dtype", SHORT)
    def test_short_rows(self, entries, dtype):
        scores = awkward_rows(entries, dtype)
        budgets = {0, 1, 3, entries // 2, entries - 1, entries, entries + 3}
        for k in sorted(budgets if ON_GPU or (dtype is F32 and entries < 50) else {3, entries - 1}):
            assert torch.equal(kernels.topk_mask(scores, k), reference.topk_mask(scores, k)), k
        rows = torch.tensor([0, 1, entries // 2, entries, entries + 2, -1], device=DEVICE)
        assert torch.equal(kernels.topk_mask(scores, rows), reference.topk_mask(scores, rows))

    @walk("k, dtype", LONG)
    def test_long_rows(self, k, dtype):
        """Narrowed down to candidates first; rows of ties have too many of those."""
        scores = awkward_rows(9000, dtype)[[0, 2, 4]]
        assert torch.equal(kernels.topk_mask(scores, k), reference.topk_mask(scores, k))

    def test_no_rows_and_no_entries(self):
        for shape in ((0, 5), (3, 0), (0, 9000)):
            assert kernels.topk_mask(torch.empty(shape, device=DEVICE), 2).shape == shape

    @DTYPES
    @pytest.mark.parametrize("projected", [False, True])
    def test_sparse_apply(self, projected, dtype):
        x, p, scores = (
            rand(3, 2, 4, 5, dtype=dtype),
            randn(3, 2, 4, 5, dtype=dtype, seed=1),
            randn(3, 4, 5, dtype=dtype),
        )
        found, mask = kernels.sparse_apply(x, p, scores, 7, projected=projected)
        expected, chosen = reference.sparse_apply(x, p, scores, 7)
        assert torch.equal(mask, chosen)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found[~chosen[:, None].bool().expand_as(x)], x[~chosen[:, None].bool().expand_as(x)])


class TestStep:
    @walk(
        "shape, projected, dtype, own",
        rows([(3, 3, 49), (2, 1, 1023), (0, 3, 5), (2, 3, 4100), (1, 2, 1)], [False, True], [F32, F64], [False, True]),
    )
    def test_against_the_formula(self, shape, projected, dtype, own):
        images, _, pixels = shape
        x, gradient = rand(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
        p = torch.minimum(torch.maximum(randn(*shape, dtype=dtype, seed=2), -x), 1 - x)
        m = randn(images, pixels, dtype=dtype, seed=3)
        if images > 1:
            gradient[0, 0, 0], gradient[1, 0, 1] = 0, float("nan")  # no step; a norm that is not finite
        mask = reference.topk_mask(m, 5)
        budget = torch.arange(images, device=DEVICE) if own else 5
        found, expected = (
            ops.spgd_step(gradient, p, m, x, mask, budget, alpha=0.3, beta=0.7, projected=projected)
            for ops in (kernels, reference)
        )
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=5 * TOLERANCE[dtype], atol=5 * TOLERANCE[dtype])
        for ours, theirs in zip(found[2:], expected[2:], strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_types_select_by_the_logits_that_they_return(self, dtype):
        x, gradient, m = (
            rand(3, 2, 40, dtype=dtype),
            randn(3, 2, 40, dtype=dtype, seed=1),
            randn(3, 40, dtype=dtype, seed=2),
        )
        p, mask = torch.zeros_like(x), reference.topk_mask(m, 4)
        _, logits, new, images, _ = kernels.spgd_step(gradient, p, m, x, mask, 4, alpha=0.25, beta=0.25, projected=True)
        assert logits.dtype == dtype and torch.equal(new, reference.topk_mask(logits, 4))
        assert torch.equal((images != x).any(1), (images != x).any(1) & new.bool())


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device: the interpreter reads values")
def test_no_op_waits_for_the_device():
    center, weight = randn(8, 16, dtype=torch.float32), randn(10, 16, dtype=torch.float32)
    labels, x = torch.arange(8, device=DEVICE), rand(8, 3, 64, dtype=torch.float32)
    mask = torch.zeros(8, 64, dtype=torch.uint8, device=DEVICE)
    for _ in range(2):  # the first time compiles
        kernels.ibp_margins(center, center.abs(), weight, None, labels)
        kernels.topk_mask(center, 3)
        kernels.cut_box_minima(weight, weight[:, 0], center, center[:, 0], labels[:, None])
        kernels.spgd_step(x, x, x[:, 0], x, mask, 3, alpha=0.1, beta=0.1, projected=True)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
