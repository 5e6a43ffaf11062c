"""What holds for any box, memory and layout: bounds contain, shrink with the box, and read no stale memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import peak_memory
from op_table import NAMES, outcome, table
from torch import Tensor
from torch._subclasses import FakeTensorMode
from walking import walk

from certtrain import kernels
from certtrain.kernels import reference

EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums of some thousand terms of size 1
pytestmark = pytest.mark.parametrize("backend", ["cpu", "reference"])
some = settings(deadline=None, max_examples=80, derandomize=True)


@pytest.fixture(autouse=True)
def use(backend):
    with kernels.use_backend(backend):
        yield


# Any box ------------------------------------------------------------------------------------------------------------


CONVOLUTION = {"stride": (1, 3), "padding": (0, 2), "dilation": (1, 2)}


@st.composite
def layers(draw):
    """(shape of the box, the layer at points, its bounds as (lower, upper), and a generator for more numbers)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    size, maybe, relu = st.integers(1, 5), st.booleans(), draw(st.booleans())
    batch, inputs, outputs = draw(st.integers(1, 3)), draw(size), draw(size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def after(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        view = (-1, *[1] * (y.ndim - 2))
        y = y if scale is None else y * scale.reshape(view)
        y = y if shift is None else y + shift.reshape(view)
        return y.relu() if relu else y

    kind = draw(st.sampled_from(["linear", "conv", "affine", "relu", "margins"]))
    bias, scale, shift = (normal(outputs) if draw(maybe) else None for _ in range(3))
    options = {"scale": scale, "shift": shift, "relu": relu}
    if kind == "linear":
        weight = normal(outputs, inputs)
        point = lambda x: after(F.linear(x, weight, bias), scale, shift)  # noqa: E731
        bound = lambda c, r: _ends(kernels.ibp_linear(c, r, weight, bias, **options))  # noqa: E731
        return (batch, inputs), point, bound, generator
    if kind == "conv":
        how = {name: draw(st.integers(*ends)) for name, ends in CONVOLUTION.items()}
        weight = normal(outputs, inputs, draw(st.integers(1, 3)), draw(st.integers(1, 2)))
        point = lambda x: after(F.conv2d(x, weight, bias, **how), scale, shift)  # noqa: E731
        bound = lambda c, r: _ends(kernels.ibp_conv2d(c, r, weight, bias, **how, **options))  # noqa: E731
        return (batch, inputs, 6, 5), point, bound, generator
    if kind == "margins":
        weight, labels = normal(outputs, inputs), torch.randint(outputs, (batch,), generator=generator)
        others = torch.tensor([[j for j in range(outputs) if j != y] for y in labels.tolist()], dtype=torch.int64)

        def point(x):
            logits = F.linear(x, weight, bias)
            return logits.gather(1, labels[:, None]) - logits.gather(1, others)

        def bound(c, r):
            lower = kernels.ibp_margins(c, r, weight, bias, labels)
            return lower, torch.full_like(lower, torch.inf)

        return (batch, inputs), point, bound, generator
    scale, shift = normal(inputs), normal(inputs)
    if kind == "affine":
        point = lambda x: after(x, scale, shift)  # noqa: E731
        bound = lambda c, r: _ends(kernels.ibp_affine(c, r, scale, shift, relu=relu))  # noqa: E731
    else:
        point, bound = F.relu, lambda c, r: _ends(kernels.ibp_relu(c, r))
    return (batch, inputs, *draw(st.sampled_from([(), (3,), (3, 2)]))), point, bound, generator


def _ends(interval: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    assert (interval[1] >= 0).all()
    return interval[0] - interval[1], interval[0] + interval[1]


def _box(shape, generator) -> tuple[Tensor, Tensor]:
    center, radius = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    return center, radius.abs() * (radius > -1)  # some entries have no radius


def _within(shape, generator, corners: bool) -> Tensor:
    signs = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return signs.sign() if corners else signs


@some
@given(layers())
def test_points_of_the_box_stay_within_the_bounds(layer):
    shape, point, bound, generator = layer
    center, radius = _box(shape, generator)
    lower, upper = bound(center, radius)
    for sample in range(20):
        y = point(center + radius * _within(shape, generator, corners=sample % 2 == 0))
        assert (y >= lower - 1e-12).all() and (y <= upper + 1e-12).all()


@some
@given(layers())
def test_a_smaller_box_has_bounds_inside(layer):
    shape, _, bound, generator = layer
    center, radius = _box(shape, generator)
    ends = torch.stack([center + radius * _within(shape, generator, corners=False) for _ in range(2)])
    low, high = ends.amin(0), ends.amax(0)
    (lower, upper), (inner_lower, inner_upper) = bound(center, radius), bound((low + high) / 2, (high - low) / 2)
    assert (inner_lower >= lower - 1e-12).all() and (inner_upper <= upper + 1e-12).all()


@some
@given(layers())
def test_a_box_without_radius_is_its_point(layer):
    shape, point, bound, generator = layer
    center, _ = _box(shape, generator)
    lower, upper = bound(center, torch.zeros(shape, dtype=torch.float64))
    torch.testing.assert_close(lower, point(center), rtol=1e-13, atol=1e-13)
    assert torch.equal(lower, upper) or upper.isposinf().all()  # equal ends: the radius is exactly 0


@some
@given(st.integers(0, 1 << 30), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.booleans())
def test_crown_step_bounds_the_forms(seed, batch, forms, neurons, upper, own_lines):
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.randn((2, batch, 1, neurons), generator=generator, dtype=torch.float64).sort(dim=0).values
    lines = (batch, forms if own_lines else 1, neurons)
    slope = torch.where(high <= 0, 0, torch.where(low >= 0, 1, high / (high - low)))
    intercept = torch.where((low < 0) & (high > 0), -slope * low, 0)
    alpha = torch.rand(lines, generator=generator, dtype=torch.float64)
    lower_slope = torch.where(high <= 0, 0, torch.where(low >= 0, 1, alpha))
    given = [line.expand(lines) if own_lines else line[:, 0] for line in (lower_slope, slope, intercept)]
    a = torch.randn((batch, forms, neurons), generator=generator, dtype=torch.float64)
    a, b = a * (a > -1.5), torch.randn((batch, forms), generator=generator, dtype=torch.float64)
    through, constant = kernels.crown_relu_step(a, b, *given, upper=upper)
    for sample in range(20):
        share = torch.rand(low.shape, generator=generator, dtype=torch.float64)
        x = low + (high - low) * (share.round() if sample % 2 else share)
        form, line = (a * x.relu()).sum(-1) + b, (through * x).sum(-1) + constant
        assert (line >= form - 1e-12).all() if upper else (line <= form + 1e-12).all()


# Sizes beyond one block or tile -------------------------------------------------------------------------------------


def _large():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def interval(*shape: int) -> tuple[Tensor, Tensor]:
        return normal(*shape), normal(*shape).abs()

    def signs(*shape: int) -> Tensor:
        return normal(*shape).round()  # with many zeros, which belong to one of the lines

    labels = torch.arange(33) % 37
    image, rows, line = interval(3, 17, 19, 23), interval(131, 97), normal(2, 9001)
    return {
        "relu": ("ibp_relu", {}, *image),
        "affine": ("ibp_affine", {"relu": True}, *image, normal(17), normal(17)),
        "affine of rows": ("ibp_affine", {"relu": True}, *rows, normal(97), normal(97)),
        "linear": ("ibp_linear", {"relu": True}, *rows, normal(65, 97), normal(65)),
        "conv": ("ibp_conv2d", {"stride": 2, "padding": 1, "relu": True}, *image, normal(9, 17, 3, 3), normal(9)),
        "margins": ("ibp_margins", {"labels": labels}, *interval(33, 65), normal(37, 65), normal(37)),
        "crown": ("crown_relu_step", {}, signs(2, 3, 9001), normal(2, 3), line, line / 2, line.abs()),
        "crown of own lines": (
            "crown_relu_step", {"upper": True}, signs(2, 3, 4097), normal(2, 3), normal(2, 4097),
            normal(2, 3, 4097), normal(2, 3, 4097),
        ),
    }  # fmt: skip


LARGE = _large()


@pytest.mark.parametrize("name", LARGE)
def test_against_torchs_gradients_of_the_formula(name):
    op, options, *leaves = LARGE[name]
    results = []
    for module in (kernels, reference):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        found = getattr(module, op)(*given, **options)
        found = (found,) if isinstance(found, Tensor) else found
        onto = [part.detach() for part in found]
        results.append((onto, torch.autograd.grad(found, given, onto)))
    torch.testing.assert_close(*results, **EXACT)


# Memory and layout --------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned():
    """Fresh memory is full of NaN, and of 255 in bytes."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    like = torch.zeros(2)
    assert all(t.isnan().all() for t in (torch.empty(2), like.new_empty(2), torch.empty_like(like)))
    assert (torch.empty(2, dtype=torch.uint8) == 255).all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@walk("name", NAMES)
@walk("last", [False, True], ids=["contiguous", "channels_last"])
def test_fresh_memory_is_written_before_it_is_read(name, last, poisoned):
    found = outcome(table(torch.float32, last)[name])
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.testing.assert_close(found, outcome(table(torch.float32, last)[name]), rtol=0, atol=0)


def _strided(leaf: Tensor) -> Tensor:
    """The same values, every other entry of a larger memory."""
    wide = torch.stack([leaf, leaf + 1], -1)[..., 0]
    return wide.mT.contiguous().mT if wide.ndim == 3 else wide


LAYOUTS = {
    "channels_last": lambda leaf: leaf.contiguous(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf,
    "strided": _strided,
    "last dimension first": lambda leaf: leaf.movedim(-1, 0).contiguous().movedim(0, -1),
}


@walk("name", NAMES)
@walk("layout", LAYOUTS)
def test_strides_carry_no_meaning(name, layout):
    call = table()[name]
    leaves = [LAYOUTS[layout](leaf) for leaf in call.leaves]
    odd = outcome(type(call)(call.run, leaves, call.gradients))
    torch.testing.assert_close(odd, outcome(call), rtol=1e-13, atol=1e-13)


@walk("name", NAMES)
@walk("layout", LAYOUTS)
def test_outputs_lie_as_their_fakes_say(name, layout):
    """A compiler lays out what follows by the fake; images in channels_last stay so."""
    call = table()[name]
    leaves = [LAYOUTS[layout](leaf) for leaf in call.leaves]
    real = call.run(*leaves)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call.run(*(mode.from_tensor(leaf) for leaf in leaves))
    for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (real, fake)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        if layout == "channels_last" and a.ndim == 4 and name.startswith(("conv", "affine", "relu", "norm")):
            assert a.is_contiguous(memory_format=torch.channels_last)


@walk("part", [0, 1, 2], ids=["y", "mean", "variance"])
@walk("shape", [(9, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 2, 3, 4), (7, 1), (2, 3, 1, 1)], ids=str)
@walk("layout", LAYOUTS)
def test_gradients_of_the_batch_statistics(shape, layout, part):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[1:2], shape[1:2])
    )

    def formula(x, weight, bias, eps):
        columns = x.transpose(0, 1).flatten(1)
        mean = columns.mean(1, keepdim=True)
        variance = (columns - mean).square().mean(1, keepdim=True)
        y = (columns - mean) / (variance + eps).sqrt() * weight[:, None] + bias[:, None]
        return y.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1), mean[:, 0], variance[:, 0]

    results = []
    for op, values in ((kernels.batch_statistics_norm, LAYOUTS[layout](x)), (formula, x)):
        leaf = values.detach().requires_grad_()
        found = op(leaf, weight, bias, 0.1)[part]
        onto = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).reshape(found.shape)
        results.append((found, *torch.autograd.grad(found, leaf, onto)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_margins_make_no_matrix_for_each_image(backend):
    """Issue 3's promise, forward + backward: below 5 % of the (B, K - 1, D) tensor, which the plain formula makes."""
    batch, classes, width = 64, 200, 512
    shapes = (batch, width), (batch, width), (classes, width), (classes,)
    leaves = [torch.ones(shape).requires_grad_() for shape in shapes]
    naive = batch * (classes - 1) * width * 4

    def run():
        found = kernels.ibp_margins(*leaves, torch.arange(batch))
        torch.autograd.grad(found.sum(), leaves)

    run()
    peak = peak_memory(run, "cpu")
    assert (peak < 0.05 * naive) if backend == "cpu" else (peak > naive)
