"""Specifications of many classes: margins are dense rows bit for bit, in memory linear in the number of classes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from problems import alone, problem_of
from test_memory import _Largest
from torch import nn
from walking import walk

from certtrain.bounds import LinfBall, SparseBall, compute_rows, memory
from certtrain.bounds.crown import backward, backward_rows, bound_forms, crown_bounds, interval_forms, joined, relax_all
from certtrain.bounds.folding import fold
from certtrain.bounds.output_forms import DenseForms, Margins
from certtrain.bounds.rounding import REAL
from certtrain.errors import InputError
from certtrain.kernels.reference import backend
from certtrain.losses.crown_ibp import fused_loss
from certtrain.verifiers import (
    AlphaStage,
    AttackStage,
    BabStage,
    Certify,
    CrownStage,
    IbpStage,
    InputSplitStage,
    LocationStage,
    Specification,
    run_cascade,
)
from certtrain.verifiers.falsify import FalsifyStage
from certtrain.verifiers.problem import rows_of_clauses
from certtrain.verifiers.stages import CleanStage, CrownIbpStage

INDICES = {
    "an image and a row": (1, 2),
    "an image and rows": (1, torch.tensor([3, 0, 3])),
    "an image and a mask of rows": (2, torch.tensor([True, False, True, False, True])),
    "images and a row each": (torch.tensor([2, 0, 2]), torch.tensor([0, 4, 1])),
    "images and a row": (torch.tensor([2, 0]), 3),
    "images and rows each": (torch.tensor([[2], [1]]), torch.tensor([[0, 4, 1], [2, 2, 3]])),
    "no images": (torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)),
}


class TestMargins:
    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[Margins, DenseForms]:
        margins = Margins.of_labels(torch.tensor([0, 5, 2]), 6).to(dtype)
        rows = [[[(k == y) - (k == j) for k in range(6)] for j in range(6) if j != y] for y in (0, 5, 2)]
        return margins, DenseForms(torch.tensor(rows, dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_are_dense_rows(self, dtype):
        margins, dense = self.pair(dtype)
        assert margins.shape == dense.shape == (3, 5, 6)
        numbers, index = torch.tensor([4, 1, 1]), torch.tensor([2, 2, 0, 1])
        for change in (
            lambda rows: rows,
            lambda rows: rows.part(numbers),
            lambda rows: rows.take(index),
            lambda rows: rows.take(index[:0]),
            lambda rows: rows.take(index).part(numbers).take(numbers - 1).part(numbers.new_tensor([2, 0])),
            lambda rows: rows.to(torch.float64),
        ):
            found, expected = change(margins), change(dense)
            assert found.shape == expected.shape and torch.equal(found.dense(), expected.dense())
            assert found.dense().dtype == expected.dense().dtype
            for size in (1, 2, 3, 100):
                parts = [list(rows.split(size)) for rows in (found, expected)]
                assert len(parts[0]) == len(parts[1]) == math.ceil(found.shape[1] / size)
                assert all(torch.equal(one.dense(), other.dense()) for one, other in zip(*parts, strict=True))

    @pytest.mark.parametrize("kind", INDICES)
    def test_of_some_numbers(self, kind):
        margins, dense = self.pair()
        found, expected = margins[INDICES[kind]], dense[INDICES[kind]]
        assert torch.equal(found, expected) and found.dtype == expected.dtype

    def test_of_outputs_and_of_a_layer(self):
        torch.manual_seed(0)
        margins, dense = self.pair(torch.float64)
        for dtype in (torch.float32, torch.float64):
            outputs, weight, bias = (torch.randn(shape, dtype=dtype) * 1e3 for shape in ((3, 6), (6, 50), (6,)))
            assert torch.equal(margins.values(outputs), dense.values(outputs))
            one, other = margins.to(dtype), dense.to(dtype)
            assert torch.equal(one.through(weight), other.through(weight))
            assert torch.equal(one.through(bias), other.through(bias))

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("place", range(6))
    def test_of_outputs_that_are_not_finite(self, value, place):
        margins, dense = self.pair()
        outputs = torch.randn(3, 6)
        outputs[1, place] = value
        found, expected = margins.values(outputs), dense.values(outputs)
        assert torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)
        outputs[1, 4] = math.inf
        found, expected = margins.values(outputs), dense.values(outputs)
        assert torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def test_rows_of_clauses_are_those_of_each_number():
    for clauses in ([0], [2, 0, 1, 0, 2, 2], [1, 1, 0], list(range(9))[::-1], [0] * 4, []):
        members, count = rows_of_clauses(torch.tensor(clauses, dtype=torch.int64))
        assert count == len(set(clauses)) == len(members)
        for clause, found in enumerate(members.tolist()):
            own = [row for row, other in enumerate(clauses) if other == clause]
            assert found == own + own[:1] * (len(found) - len(own))
        assert members.shape[1] == max((clauses.count(clause) for clause in clauses), default=1)
    for clauses in ([1], [0, 2, 2], [3, 0, 1]):  # nothing would be proved of the missing one
        with pytest.raises(InputError, match=r"^specification: found no row of clause \d of \d; accepted"):
            rows_of_clauses(torch.tensor(clauses))


def a_problem(classes: int, ball=None, count: int = 3, convolution: bool = False, seed: int = 0):
    torch.manual_seed(seed)
    first = [nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 8)]
    layers = first if convolution else [nn.Flatten(), nn.Linear(9, 8)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, classes)).eval()
    with torch.no_grad():
        model[-1].weight *= 3
    images = torch.rand(count, 1, 3, 3)
    labels = model(images).argmax(1)
    labels[-1] = (labels[-1] + 1) % classes
    return problem_of(model, images, labels, ball or LinfBall(0.04), classes)


def densely(problem):
    own = problem.specification
    return replace(problem, specification=Specification(own.rows, own.offsets, own.clauses, own.labels))


STAGES = {
    "clean": CleanStage(),
    "attack": AttackStage(),
    "ibp": IbpStage(),
    "crown_ibp": CrownIbpStage(),
    "crown": CrownStage(),
    "alpha": AlphaStage(steps=3),
    "falsify": FalsifyStage(steps=3, starts=3),
    "input_split": InputSplitStage(batch=8),
    "bab": BabStage(),
    "location": LocationStage(),
}
AFTER_CROWN = ("alpha", "falsify", "input_split", "bab")


@contextmanager
def limited(size: int | None) -> Iterator[None]:
    """Budgets of ``size`` bytes for what is computed together, and for what is kept the least."""
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:
            patch.setattr(memory, "CHUNK", size)
            patch.setattr(memory, "ROUND", size)
            patch.setattr(memory, "_installed", lambda: 8 * memory.SHARE * size)
        yield


@walk("size", [None, 3000, 1])
@walk("kind", STAGES)
def test_stages_find_the_same_of_margins_as_of_dense_rows(kind, size):
    ball = SparseBall(1) if kind == "location" else None
    problem = a_problem(7, ball, convolution=kind in ("crown", "bab"))
    findings = []
    for asked in (problem, densely(problem)):
        with limited(size):
            known = alone(CrownStage(), asked).known if kind in AFTER_CROWN else None
            findings.append(alone(STAGES[kind], asked, known))
    found, expected = findings
    assert found.statuses == expected.statuses and torch.equal(found.known.rows, expected.known.rows)
    assert (found.lower is None) == (expected.lower is None)
    assert found.lower is None or torch.equal(found.lower, expected.lower)
    for one, other in zip(found.counterexamples or [], expected.counterexamples or [], strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


@walk("arithmetic", ["nearest", "real", "float32"])
def test_verdicts_are_the_same(arithmetic):
    stages = Certify(stages=("ibp", "crown_ibp", "crown", "alpha", "bab")).build(0)
    problem = a_problem(9, count=6)
    found, expected = (
        [replace(verdict, seconds=0, spent={}, search=None, peak_memory=None, counterexample=None)
         for verdict in run_cascade(asked, stages, arithmetic=arithmetic)]
        for asked in (problem, densely(problem))
    )  # fmt: skip
    assert found == expected and {"verified", "misclassified"} <= {verdict.status for verdict in found}


@torch.no_grad()
def test_windows_change_no_bound():
    """Up to the order of sums: backward passes and intervals of few rows at a time, with and without a rounding."""
    problem = a_problem(12, convolution=True)
    network = fold(problem.network, (1, 3, 3))
    careful = replace(fold(problem.network, (1, 3, 3), dtype=torch.float64, as_written=True), rounding=REAL)
    rows, region = problem.specification.forms, problem.region
    wide, forms = region.to(torch.float64), rows.to(torch.float64)
    found = []
    for size in (1 << 40, 1):
        with limited(size):
            bounds = crown_bounds(network, region)
            linear = backward_rows(network, rows, problem.specification.offsets, relax_all(network, bounds))
            torch.testing.assert_close(linear.lower(region), bound_forms(network, region, rows.dense(), bounds))
            intervals = compute_rows(problem.network, region, rows), interval_forms(careful, wide, forms)
            found.append((linear.forms, *intervals))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_parts_of_a_linear_bound_join():
    problem = a_problem(7)
    network, rows = fold(problem.network, (1, 3, 3)), problem.specification.rows
    lines = relax_all(network, crown_bounds(network, problem.region))
    last = len(network.operations) - 1
    whole = backward(network, last, rows, lines)
    parts = joined([backward(network, last, part, lines) for part in torch.split(rows, 4, 1)])
    torch.testing.assert_close(parts.forms, whole.forms)
    torch.testing.assert_close(parts.lower(problem.region), whole.lower(problem.region))


@walk("kind", STAGES)
def test_the_largest_array_is_linear_in_the_classes(kind):
    """With the least budgets, so that what is computed together is one row, one point or one subproblem."""
    largest = []
    for classes in (40, 160):
        problem = a_problem(classes, SparseBall(1) if kind == "location" else LinfBall(0.002), count=2)
        with limited(1):
            known = alone(CrownStage(), problem).known if kind in AFTER_CROWN else None
            with _Largest() as mode:
                alone(STAGES[kind], problem, known)
        largest.append(mode.bytes_)
    assert largest[1] <= 4.5 * largest[0] and largest[1] < 160 * 159 * 4


def test_a_cascade_of_a_thousand_classes():
    problem = a_problem(1000, LinfBall(0.001), count=8)
    with limited(1 << 20), _Largest() as mode:
        verdicts = run_cascade(problem, Certify(stages=("attack", "ibp", "crown")).build(0))
    assert mode.bytes_ <= 1 << 20
    assert [verdict.status for verdict in verdicts].count("misclassified") == 1


class TestFusedLoss:
    @walk("best_layer", [False, True])
    def test_of_margins_is_that_of_dense_rows(self, best_layer):
        problem = a_problem(11, LinfBall(0.1), convolution=True)
        network, rows = fold(problem.network.double(), (1, 3, 3)), problem.specification.forms.to(torch.float64)
        region, found = problem.region.to(torch.float64), []
        for given in (rows, rows.dense()):
            loss = fused_loss(network, region, given, best_layer).sum()
            found.append((loss, *torch.autograd.grad(loss, list(problem.network.parameters()))))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert found[0][1].abs().max() > 0

    def test_sums_of_rows(self):
        margins = Margins.of_labels(torch.tensor([0, 3]), 4).part(torch.tensor([2, 0])).to(torch.float64)
        weights = torch.tensor([[1.0, 10.0], [2.0, 5.0]], dtype=torch.float64)
        assert margins.weighted(weights).tolist() == [[11, -10, 0, -1], [-5, 0, -2, 7]]
        assert torch.equal(DenseForms(margins.dense()).weighted(weights), margins.weighted(weights))


def test_the_gradient_of_interval_margins_in_plain_torch_is_linear_in_the_classes():
    torch.manual_seed(0)
    largest = []
    for classes in (1, 2, 40, 160):
        labels = torch.randint(0, classes, (5,))
        grad, radius, weight = torch.randn(5, classes - 1), torch.rand(5, 3), torch.randn(classes, 3)
        with _Largest() as mode:
            found = backend.margins_backward(grad, radius, weight, labels)
        rows = Margins.of_labels(labels, classes).dense()
        leaves = radius.clone().requires_grad_(), weight.clone().requires_grad_()
        lower = -((rows @ leaves[1]).abs() @ leaves[0].unsqueeze(2)).squeeze(2)
        for one, other in zip(found, torch.autograd.grad((grad * lower).sum(), leaves), strict=True):
            torch.testing.assert_close(one, other)
        largest.append(mode.bytes_)
    assert largest[3] <= 4.5 * largest[2] and largest[3] < 160 * 159 * 4


def test_values_of_one_images_forms_at_many_outputs():
    outputs, labels = torch.randn(20, 5), torch.tensor([3])
    margins = Margins.of_labels(labels, 5)
    torch.testing.assert_close(margins.values(outputs), DenseForms(margins.dense()).values(outputs), rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        Margins.of_labels(torch.tensor([3, 1]), 5).values(outputs)
