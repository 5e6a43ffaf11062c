"""Every kernel against lower/upper arithmetic with W+ and W-, which never forms a center or a radius."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from walking import walk

from certtrain import kernels
from certtrain.kernels import linear, reference

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of at most a hundred terms of size 1


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request):
    with kernels.use_backend(request.param):
        yield request.param


def interval(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(shape, generator=generator, dtype=torch.float64)
    radius = torch.rand(shape, generator=generator, dtype=torch.float64) / 2
    return center.to(dtype), radius.to(dtype)


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_ends(found, lower, upper, **tolerance):
    center, radius = found
    torch.testing.assert_close(center - radius, lower, **(tolerance or EXACT))
    torch.testing.assert_close(center + radius, upper, **(tolerance or EXACT))


def layered(function, center, radius, weight, bias, scale, shift, relu):
    """Lower and upper end of relu(scale * (W x + b) + shift), by the signs of W and of scale."""
    low, high = center - radius, center + radius
    plus, minus = weight.clamp(min=0), weight.clamp(max=0)
    lower, upper = function(low, plus) + function(high, minus), function(high, plus) + function(low, minus)

    def per_output(values):
        return values if weight.ndim == 2 else values.reshape(-1, 1, 1)

    if bias is not None:
        lower, upper = lower + per_output(bias), upper + per_output(bias)
    if scale is not None:
        ends = lower * per_output(scale), upper * per_output(scale)
        lower, upper = torch.minimum(*ends), torch.maximum(*ends)
    if shift is not None:
        lower, upper = lower + per_output(shift), upper + per_output(shift)
    return (lower.clamp(min=0), upper.clamp(min=0)) if relu else (lower, upper)


OPTIONS = list(itertools.product([False, True], repeat=4))


@walk("shape", [(3, 5), (1, 1), (0, 5), (2, 3, 5), (2, 0, 5), (5,), (33, 17)], ids=str)
@walk("outputs", [1, 4, 7])
def test_linear(shape, outputs, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 2 * shape[-1])  # two rows at a time, the last block ragged
    center, radius = interval(*shape)
    weight, vectors = randn(outputs, shape[-1]), randn(3, outputs, seed=2)
    for *given, relu in OPTIONS:
        bias, scale, shift = (v if use else None for v, use in zip(vectors, given))
        found = kernels.ibp_linear(center, radius, weight, bias, scale=scale, shift=shift, relu=relu)
        assert_ends(found, *layered(F.linear, center, radius, weight, bias, scale, shift, relu))
        twin = reference.ibp_linear(center, radius, weight, bias, scale=scale, shift=shift, relu=relu)
        torch.testing.assert_close(found, twin, **EXACT)


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=["no outputs", "no inputs"])
def test_linear_without_outputs_or_inputs(shape, relu):
    leaves = [leaf.requires_grad_() for leaf in (*interval(2, shape[1]), randn(*shape), randn(shape[0], seed=2))]
    found = kernels.ibp_linear(*leaves, relu=relu)
    expected = reference.ibp_linear(*leaves, relu=relu)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(ends[0].sum() + ends[1].sum(), leaves) for ends in (found, expected)]
    torch.testing.assert_close(*gradients)


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": 2, "padding": 2},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": "valid"},
    {"groups": 2, "padding": 1},
    {"groups": 4, "stride": 3},
]


@walk("options", CONVOLUTIONS, ids=str)
@walk("batch", [2, 0])
def test_conv(options, batch):
    center, radius = interval(batch, 4, 7, 5)
    weight, vectors = randn(8, 4 // options.get("groups", 1), 3, 2), randn(3, 8, seed=2)
    for *given, relu in OPTIONS:
        bias, scale, shift = (v if use else None for v, use in zip(vectors, given))
        found = kernels.ibp_conv2d(center, radius, weight, bias, **options, scale=scale, shift=shift, relu=relu)
        function = lambda x, w: F.conv2d(x, w, **options)  # noqa: E731
        assert_ends(found, *layered(function, center, radius, weight, bias, scale, shift, relu))


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3), (2, 4, 3, 5), (0, 4, 3, 3)], ids=str)
def test_affine(shape):
    center, radius = interval(*shape)
    scale, shift = torch.tensor([-2, -0.5, 0, 1.5], dtype=torch.float64), randn(4, seed=2)
    view = (4, *[1] * (len(shape) - 2))
    ends = [end * scale.reshape(view) + shift.reshape(view) for end in (center - radius, center + radius)]
    assert_ends(kernels.ibp_affine(center, radius, scale, shift), torch.minimum(*ends), torch.maximum(*ends))


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4, 5)], ids=str)
def test_relu(shape):
    center, radius = interval(*shape)
    assert_ends(kernels.ibp_relu(center, radius), (center - radius).clamp(min=0), (center + radius).clamp(min=0))
    torch.testing.assert_close(kernels.ibp_relu(center, radius), reference.ibp_relu(center, radius))


def test_relu_keeps_nan():
    """A bound that is unknown must not look like a proof."""
    center, radius = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, float("nan")])
    assert all(part.isnan().all() for part in kernels.ibp_relu(center, radius))


@pytest.mark.parametrize("batch", [0, 1, 6])
@pytest.mark.parametrize("with_bias", [True, False])
def test_margins(batch, with_bias):
    center, radius = interval(batch, 5)
    weight, bias, labels = randn(4, 5), randn(4, seed=2) if with_bias else None, torch.arange(batch) % 4
    found = kernels.ibp_margins(center, radius, weight, bias, labels)
    assert found.shape == (batch, 3)
    for row, label in enumerate(labels.tolist()):
        for column, other in enumerate(j for j in range(4) if j != label):
            difference = weight[label] - weight[other]
            corner = center[row] - difference.sign() * radius[row]  # attains the minimum
            expected = difference @ corner + (0 if bias is None else bias[label] - bias[other])
            torch.testing.assert_close(found[row, column], expected, **EXACT)


def test_margins_are_never_below_the_difference_of_the_logits_bounds():
    center, radius = interval(6, 5)
    weight, labels = randn(4, 5), torch.arange(6) % 4
    logits, spread = kernels.ibp_linear(center, radius, weight)
    lower, upper = logits - spread, logits + spread
    apart = torch.stack([low[y] - up[[j for j in range(4) if j != y]] for low, up, y in zip(lower, upper, labels)])
    assert (kernels.ibp_margins(center, radius, weight, None, labels) >= apart - 1e-12).all()


class TestExactness:
    """The bounds are not only sound: a corner of the box attains each of them."""

    def test_linear(self):
        center, radius = interval(1, 6)
        weight, bias = randn(3, 6), randn(3, seed=2)
        found = kernels.ibp_linear(center, radius, weight, bias, relu=True)
        corners = center + weight.sign() * radius, center - weight.sign() * radius  # (3, 6): one for each output
        upper, lower = (F.linear(corner, weight, bias).diagonal()[None].relu() for corner in corners)
        assert_ends(found, lower, upper)

    def test_conv_at_the_border(self):
        center, radius = interval(1, 2, 3, 3)
        weight = randn(1, 2, 3, 3)
        found = kernels.ibp_conv2d(center, radius, weight, padding=1)
        x = center.clone().requires_grad_()
        (signs,) = torch.autograd.grad(F.conv2d(x, weight, padding=1)[0, 0, 0, 0], x)
        corner = F.conv2d(center - signs.sign() * radius, weight, padding=1)[0, 0, 0, 0]
        torch.testing.assert_close((found[0] - found[1])[0, 0, 0, 0], corner, **EXACT)


class TestGradients:
    """float64 finite differences in every argument."""

    def check(self, function, *leaves):
        assert torch.autograd.gradcheck(function, [leaf.clone().requires_grad_() for leaf in leaves])

    @walk("shape", [(3, 4), (2, 2, 4), (0, 4), (4,)], ids=str)
    def test_linear(self, shape, monkeypatch):
        monkeypatch.setattr(linear, "BLOCK", 8)
        self.check(
            lambda c, r, w, b, a, t: kernels.ibp_linear(c, r, w, b, scale=a, shift=t, relu=True),
            *interval(*shape), randn(5, 4), *randn(3, 5, seed=2),
        )  # fmt: skip

    @walk("options", [{"padding": 1, "stride": 2}, {"groups": 2, "dilation": 2}], ids=str)
    def test_conv(self, options):
        self.check(
            lambda c, r, w, b, a, t: kernels.ibp_conv2d(c, r, w, b, **options, scale=a, shift=t, relu=True),
            *interval(2, 2, 5, 4), randn(4, 2 // options.get("groups", 1), 2, 2), *randn(3, 4, seed=2),
        )  # fmt: skip

    def test_affine(self):
        self.check(kernels.ibp_affine, *interval(2, 3, 2), randn(3), randn(3, seed=2))

    @pytest.mark.parametrize("shape", [(4, 5), (), (0, 3)], ids=str)
    def test_relu(self, shape):
        self.check(kernels.ibp_relu, *interval(*shape))

    def test_relu_at_a_kink_as_torch(self):
        for function in (kernels.ibp_relu, reference.ibp_relu):
            center, radius = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
            sum(function(center, radius)).backward()
            assert center.grad == 0 and radius.grad == 0

    def test_margins(self):
        labels = torch.tensor([2, 0, 1])
        self.check(
            lambda c, r, w, b: kernels.ibp_margins(c, r, w, b, labels), *interval(3, 4), randn(3, 4), randn(3, seed=2)
        )

    @pytest.mark.parametrize("shape", [(5, 3), (2, 3, 2, 2)], ids=str)
    def test_batch_statistics_norm(self, shape):
        self.check(
            lambda x, w, b: kernels.batch_statistics_norm(x, w, b, 1e-3), interval(*shape)[0], randn(3), randn(3)
        )
        self.check(lambda x: kernels.batch_statistics_norm(x, None, None, 1e-3)[1:], interval(*shape)[0])

    def test_only_what_is_asked(self):
        center, radius = interval(3, 4)
        weight = randn(2, 4).requires_grad_()
        sum(part.sum() for part in kernels.ibp_linear(center, radius, weight)).backward()
        expected = center.sum(0) + weight.detach().sign() * radius.sum(0)
        torch.testing.assert_close(weight.grad, expected, **EXACT)

    def test_of_a_transposed_weight(self):
        (center, radius), weight = interval(3, 4), randn(4, 2).T
        leaves = [weight.clone(memory_format=torch.preserve_format), weight.contiguous()]
        for leaf in leaves:
            parts = kernels.ibp_linear(center, radius, leaf.requires_grad_(), relu=True)
            (parts[0] + parts[1].square()).sum().backward()
        assert not leaves[0].is_contiguous()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **EXACT)


class TestBatchStatisticsNorm:
    @pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5), (3, 3, 4, 2), (1, 3, 2, 1)], ids=str)
    def test_against_the_formula(self, shape):
        x, weight, bias = interval(*shape)[0], randn(3), randn(3, seed=2)
        found, mean, variance = kernels.batch_statistics_norm(x, weight, bias, 0.1)
        columns = x.transpose(0, 1).flatten(1)
        torch.testing.assert_close(mean, columns.mean(1), **EXACT)
        torch.testing.assert_close(variance, columns.square().mean(1) - columns.mean(1).square(), **EXACT)
        expected = (columns - mean[:, None]) / (variance[:, None] + 0.1).sqrt() * weight[:, None] + bias[:, None]
        torch.testing.assert_close(found.transpose(0, 1).flatten(1), expected, **EXACT)


class TestLayout:
    """Strides carry no meaning."""

    def test_channels_last(self):
        center, radius = interval(2, 4, 6, 5)
        weight = randn(3, 4, 3, 3)
        expected = kernels.ibp_conv2d(center, radius, weight, padding=1, relu=True)
        last = [part.contiguous(memory_format=torch.channels_last) for part in (center, radius, weight)]
        torch.testing.assert_close(kernels.ibp_conv2d(*last, padding=1, relu=True), expected, **EXACT)
        scale = randn(4)
        torch.testing.assert_close(
            kernels.ibp_affine(*last[:2], scale, scale), kernels.ibp_affine(center, radius, scale, scale), **EXACT
        )

    def test_mixed_strides(self):
        """Center and radius need not have the same strides."""
        center, radius = interval(6, 8)
        odd, weight = radius.T.contiguous().T, randn(3, 8)
        assert odd.stride() != center.stride()
        sliced = torch.stack([center, center], -1)[..., 0]
        for function in (kernels.ibp_relu, lambda c, r: kernels.ibp_linear(c, r, weight)):
            torch.testing.assert_close(function(sliced, odd), function(center, radius), **EXACT)

    def test_expanded(self):
        center, radius = torch.randn(1, 8).expand(4, 8), torch.tensor(0.1).expand(4, 8)
        expected = kernels.ibp_relu(center.contiguous(), radius.contiguous())
        torch.testing.assert_close(kernels.ibp_relu(center, radius), expected)
        weight = torch.randn(3, 8)
        expected = kernels.ibp_linear(center.contiguous(), radius.contiguous(), weight)
        torch.testing.assert_close(kernels.ibp_linear(center, radius, weight), expected)

    def test_inputs_stay_as_they_are(self):
        center, radius = interval(3, 4, 5, 5)
        before = center.clone(), radius.clone()
        kernels.ibp_relu(center, radius)
        kernels.ibp_affine(center, radius, randn(4), randn(4))
        kernels.ibp_conv2d(center, radius, randn(2, 4, 3, 3), relu=True)
        kernels.ibp_linear(center, radius, randn(2, 5), relu=True)
        assert torch.equal(center, before[0]) and torch.equal(radius, before[1])


def test_zero_radius_stays_exactly_zero():
    vector, image = interval(3, 4, dtype=torch.float32)[0], interval(3, 4, 5, 5, dtype=torch.float32)[0]
    weight, kernel, scale = randn(6, 4).float(), randn(4, 4, 3, 3).float(), randn(4).float()
    found = [
        kernels.ibp_relu(vector, torch.zeros_like(vector)),
        kernels.ibp_affine(image, torch.zeros_like(image), scale, scale),
        kernels.ibp_linear(vector, torch.zeros_like(vector), weight, relu=True),
        kernels.ibp_conv2d(image, torch.zeros_like(image), kernel, scale, scale=scale, shift=scale, relu=True),
    ]
    assert all((radius == 0).all() for _, radius in found)
    torch.testing.assert_close(found[2][0], F.linear(vector, weight).relu(), rtol=0, atol=0)


@pytest.mark.parametrize("features", [1, 10, 1000])
def test_float32_within_its_rounding(features):
    """|error| <= gamma(D + 8) (|W| (|c| + r) + |b|), gamma(n) = n u: a dot product's a-priori bound."""
    center, radius = interval(16, features, dtype=torch.float32)
    weight, bias = randn(8, features).float(), randn(8, seed=2).float()
    wide = [part.double() for part in (center, radius, weight, bias)]
    lower, upper = layered(F.linear, *wide, None, None, True)
    error = (features + 8) * 2.0**-24 * F.linear(wide[0].abs() + wide[1], wide[2].abs(), wide[3].abs())
    found, spread = (part.double() for part in kernels.ibp_linear(center, radius, weight, bias, relu=True))
    assert ((found - spread - lower).abs() <= error).all() and ((found + spread - upper).abs() <= error).all()
    assert (spread >= 0).all()
