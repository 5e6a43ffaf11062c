"""Minima of linear forms over cut boxes: between the whole box's and the exact ones, near the latter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from certtrain import kernels
from certtrain.kernels import reference

some = settings(deadline=None, max_examples=150, derandomize=True)
BACKENDS = "cpu", "reference"


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with kernels.use_backend(request.param):
        yield request.param


def exact(form: Tensor, cut: Tensor, offset: Tensor) -> tuple[float, float]:
    """(maximum of the dual, the multiplier at it) without the form's constant: a breakpoint, or 0; inf if nothing is
    left of the box."""
    form, cut, offset = form.double(), cut.double(), offset.double()
    if offset > cut.abs().sum():
        return math.inf, math.inf
    breaks = -form[cut != 0] / cut[cut != 0]
    t = torch.cat([torch.zeros(1, dtype=torch.float64), breaks[breaks > 0]])
    values = t * offset - (form + t[:, None] * cut).abs().sum(1)
    best = values.max(0)
    return float(best.values), float(t[best.indices])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(forms: int, entries: int, cuts: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Forms and cuts that are partly alike, as a neuron's and its successor's; every form under every cut."""
    shared = randn(entries, seed=4)
    f, c = randn(forms, entries) + randn(forms, 1, seed=5) * shared, randn(cuts, entries, seed=2) + shared
    offsets = c.abs().sum(1) * (randn(cuts, seed=3) / 4).clamp(-0.9, 0.9)
    given = (t.to(dtype) for t in (f, randn(forms, seed=1), c, offsets))
    return *given, torch.arange(forms).expand(cuts, forms)


def whole_box(forms: Tensor, constants: Tensor, rows: Tensor) -> Tensor:
    return (constants.double() - forms.double().abs().sum(1))[rows]


def best_bounds(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    return torch.tensor(
        [
            [float(constants[row]) + exact(forms[row], cuts[item], offsets[item])[0] for row in chosen]
            for item, chosen in enumerate(rows.tolist())
        ],
        dtype=torch.float64,
    )


def test_against_linear_programs(backend):
    forms, constants, cuts, offsets, rows = problem(6, 9, 5)
    found = kernels.cut_box_minima(forms, constants, cuts, offsets, rows)
    for item, cut in enumerate(cuts):
        for j, form in enumerate(forms):
            solved = linprog(form.numpy(), cut[None].numpy(), [-float(offsets[item])], bounds=(-1, 1), method="highs")
            assert solved.status == 0
            least = solved.fun + float(constants[j])
            assert exact(form, cut, offsets[item])[0] + float(constants[j]) == pytest.approx(least, abs=1e-9)
            assert found[item, j] <= least + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("entries", [3, 40, 784])
def test_most_of_the_gain(entries, dtype):
    """Single ones lose more where little is gained, at a small t."""
    given = problem(40, entries, 12, dtype)
    found, best = kernels.cut_box_minima(*given).double(), best_bounds(*given)
    whole = whole_box(given[0], given[1], given[4])
    tolerance = 4 * torch.finfo(dtype).eps * float(whole.abs().max())
    assert (found <= best + tolerance).all() and (found >= whole - tolerance).all()
    assert (found - whole).sum() >= 0.95 * (best - whole).sum()


# Any numbers --------------------------------------------------------------------------------------------------------

ENTRY = st.sampled_from([0, 0, 1, -1, 1, 0.5, -2, 0.1, 3, -0.7])
SCALE = st.sampled_from([1.0, 1.0, 1e-3, 1e30, 1e-30, 1e-41])
SHARES = st.sampled_from([-1.5, -1.0, -0.5, 0.0, 0.0, 0.2, 0.5, 0.9, 1.0, 1.5])


@st.composite
def problems(draw):
    """Few entries with ties, zeros and repetitions, forms that are the cut or its negative, and any scales."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    count, entries, items, each = (draw(st.integers(*ends)) for ends in ((1, 3), (0, 7), (0, 3), (0, 4)))

    def vectors(number: int) -> Tensor:
        values = [[draw(ENTRY) for _ in range(entries)] for _ in range(number)]
        scales = torch.tensor([[draw(SCALE)] for _ in range(number)], dtype=torch.float64).reshape(number, 1)
        return (torch.tensor(values, dtype=torch.float64).reshape(number, entries) * scales).to(dtype)

    forms, cuts = vectors(count), vectors(items)
    if items:
        forms[0] = draw(st.sampled_from([1, -1, 0])) * cuts[0] + draw(st.booleans()) * forms[0]
    shares = torch.tensor([draw(SHARES) for _ in range(items)], dtype=dtype)
    offsets = torch.where(cuts.abs().sum(1) > 0, shares * cuts.abs().sum(1), shares)
    constants = torch.tensor([draw(ENTRY) for _ in range(count)], dtype=dtype)
    rows = [[draw(st.integers(-1, count - 1)) for _ in range(each)] for _ in range(items)]
    return forms, constants, cuts, offsets, torch.tensor(rows, dtype=torch.int64).reshape(items, each)


def rounding(form: Tensor, constant: Tensor) -> float:
    """What sums of terms up to eight times those of the form and its constant are off by."""
    size = float(constant.double().abs() + 20 * form.double().abs().sum())
    return (len(form) + 8) * (torch.finfo(form.dtype).eps * size + torch.finfo(form.dtype).tiny)


@some
@given(problems())
def test_between_the_whole_box_and_the_exact_minimum(given):
    forms, constants, cuts, offsets, rows = given
    found = kernels.cut_box_minima(*given)
    assert found.shape == rows.shape and found.dtype == forms.dtype
    for item, chosen in enumerate(rows.tolist()):
        for value, row in zip(found[item].tolist(), chosen, strict=True):
            if row < 0:
                assert value == -math.inf
                continue
            form, constant = forms[row], float(constants[row])
            whole, (best, t) = -float(form.double().abs().sum()), exact(form, cuts[item], offsets[item])
            off = rounding(form, constants[row])
            assert constant + whole - off <= value <= constant + best + off
            norm, size = float(cuts[item].double().abs().sum()), -whole
            normal = size > 0 and norm > torch.finfo(form.dtype).tiny and size / norm < torch.finfo(form.dtype).max / 16
            if normal and best < math.inf and 0.125 <= t * norm / size <= 12:
                assert value - constant - whole >= 0.5 * (best - whole) - off  # concavity alone


@some
@given(problems(), st.integers(-3, 3))
def test_scales_carry_no_meaning(given, power):
    """A power of 2 on a cut changes nothing, one on a form its bounds alike; small numbers are left out."""
    forms, constants, cuts, offsets, rows = given
    if any((t[t != 0].abs() < 1e-35).any() for t in (forms, cuts)):
        return
    factor = 2.0**power
    found = kernels.cut_box_minima(*given)
    assert torch.equal(kernels.cut_box_minima(forms, constants, cuts * factor, offsets * factor, rows), found)
    scaled = kernels.cut_box_minima(forms * factor, constants * factor, cuts, offsets, rows)
    torch.testing.assert_close(scaled, found * factor, rtol=1e-6, atol=0)


# Special cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_form_that_is_its_cut(dtype):
    """Over cut · z <= -offset: its minimum is the whole box's, its negative's is the offset."""
    cut = torch.tensor([1.0, -2, 0, 0.5], dtype=dtype)
    forms, constants = torch.stack([cut, -cut, -3 * cut]), torch.zeros(3, dtype=dtype)
    found = kernels.cut_box_minima(forms, constants, cut[None], cut.new_tensor([2.0]), torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(found, cut.new_tensor([[-3.5, 2, 6]]))


@pytest.mark.parametrize("shape", [(0, 4, 2, 0), (3, 4, 0, 2), (3, 4, 2, 0), (0, 0, 0, 0), (0, 4, 2, 3)], ids=str)
def test_nothing_to_bound(shape):
    forms, entries, items, each = shape
    rows = torch.full((items, each), -1)
    found = kernels.cut_box_minima(
        torch.ones(forms, entries), torch.ones(forms), torch.ones(items, entries), torch.ones(items), rows
    )
    assert found.shape == (items, each) and (found == -torch.inf).all()


@pytest.mark.parametrize("offset", [-1.0, 0.0, 1.0])
def test_no_entries(offset):
    found = kernels.cut_box_minima(
        torch.ones(2, 0), torch.tensor([1.0, -2]), torch.ones(1, 0), torch.tensor([offset]), torch.tensor([[1, 0, -1]])
    )
    assert found.tolist() == [[-2, 1, -math.inf]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_that_are_not_finite(dtype):
    nan, inf, huge = math.nan, math.inf, torch.finfo(dtype).max
    forms = torch.tensor([[1.0, 2], [nan, 0], [inf, 0], [-inf, 1], [huge, huge], [1, 1], [1, 1], [1, 1]], dtype=dtype)
    constants = torch.tensor([1.0, 1, 1, 1, 1, inf, nan, -inf], dtype=dtype)
    cuts = torch.tensor([[1.0, 1], [nan, 1], [inf, 1], [-inf, inf], [0, 0], [1, 1], [1, 1], [1, 1]], dtype=dtype)
    offsets = torch.tensor([0.0, 0, 0, 0, 1, inf, -inf, nan], dtype=dtype)
    found = kernels.cut_box_minima(forms, constants, cuts, offsets, torch.arange(8).expand(8, 8))
    assert (found[:, 0] == -2).all()
    assert (found[:, 1:] == -inf).all()


def test_a_bound_that_overflows_is_none():
    huge = torch.finfo(torch.float32).max
    form, cut, rows = torch.tensor([[huge / 4]]), torch.tensor([[-1.0]]), torch.tensor([[0]])
    found = kernels.cut_box_minima(form, torch.tensor([huge]), cut, torch.tensor([0.9]), rows)
    assert found.item() == -math.inf


def test_leaves_its_arguments_alone_and_needs_no_gradient():
    given = problem(5, 8, 3)
    leaves = [t.clone().requires_grad_() for t in given[:4]]
    found = kernels.cut_box_minima(*leaves, given[4])
    assert not found.requires_grad
    assert torch.equal(found, kernels.cut_box_minima(*given))
    assert all(torch.equal(leaf, before) for leaf, before in zip(leaves, given))


def test_each_pair_alone_and_in_any_order():
    forms, constants, cuts, offsets, rows = problem(7, 33, 4)
    found = kernels.cut_box_minima(forms, constants, cuts, offsets, rows)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    picked = kernels.cut_box_minima(forms, constants, cuts.flip(0), offsets.flip(0), order.expand(4, 7))
    torch.testing.assert_close(picked, found.flip(0)[:, order], rtol=1e-13, atol=1e-13)
    for item in range(4):
        alone = kernels.cut_box_minima(forms[2:3], constants[2:3], cuts[item, None], offsets[item, None], rows[:1, :1])
        torch.testing.assert_close(alone[0, 0], found[item, 2], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_backends_agree(dtype):
    given = problem(50, 301, 20, dtype)
    expected = reference.cut_box_minima(*given)
    size = float(given[0].abs().sum(1).max())
    torch.testing.assert_close(
        kernels.cut_box_minima(*given), expected, rtol=0, atol=30 * torch.finfo(dtype).eps * size
    )
