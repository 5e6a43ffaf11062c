"""Clipping a box loses no point that may be a counterexample: exactly, for lines in fractions; and for networks, at
points of the box and its corners, in every arithmetic."""

import itertools
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from problems import unknown
from torch import nn

from certtrain.bounds import Box
from certtrain.bounds.crown import crown_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.rounding import FLOAT32, REAL
from certtrain.verifiers import Problem, Specification
from certtrain.verifiers.bounds_so_far import BoundsSoFar
from certtrain.verifiers.box_bounds import BoxBounds
from certtrain.verifiers.clipping import Cuts, Part, rounded_down
from certtrain.verifiers.engine import SearchOutcome
from certtrain.verifiers.input_split import BoxBounder, Boxes, split_inputs

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def cuts_of(box: Box, forms: torch.Tensor, constants: torch.Tensor) -> Cuts:
    """The cuts by lines, forms (P, C, K, N) and constants (P, C, K)."""
    flat, end = forms.flatten(1, 2), constants.flatten(1)
    least = torch.where(flat > 0, box.lower.unsqueeze(1), box.upper.unsqueeze(1)) * flat
    return Cuts(forms, rounded_down(least.sum(-1) + end, flat, end, box).reshape(constants.shape))


def exact(values: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.double().flatten().tolist()]


def on_line(form: list[Fraction], constant: Fraction, point: list[Fraction], dtype: torch.dtype) -> list[torch.Tensor]:
    """Points on both sides of form · x + constant = 0, moved there from ``point`` along one input each."""
    found = []
    for number, slope in enumerate(form):
        if slope:
            value = sum((f * x for f, x in zip(form, point, strict=True)), constant)
            moved = torch.tensor([float(x) for x in point], dtype=dtype)
            moved[number] = float(point[number] - value / slope)
            for toward in (-torch.inf, torch.inf):
                other = moved.clone()
                other[number] = torch.nextafter(other[number], other.new_tensor(toward))
                found.append(other)
            found.append(moved)
    return found


class TestLines:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["usual", "steep", "flat", "with zeros", "far away", "point"])
    def test_no_point_is_lost_exactly(self, kind, dtype):
        draw = torch.Generator().manual_seed(len(kind))
        smaller = lost = kept = 0
        for _ in range(30):
            inputs, clauses, lines = (int(torch.randint(1, 4, (), generator=draw)) for _ in range(3))
            forms = torch.randn(1, clauses, lines, inputs, generator=draw, dtype=torch.float64)
            lower = torch.randn(1, inputs, generator=draw, dtype=torch.float64)
            width = torch.rand(1, inputs, generator=draw, dtype=torch.float64)
            if kind == "with zeros":
                forms[..., 0] = 0
            scale = {"steep": 1e6, "flat": 1e-6}.get(kind, 1.0)
            lower = lower + 1e4 * (kind == "far away")
            forms, lower, upper = (
                x.to(dtype) for x in (scale * forms, lower, lower + width * (kind != "point"))
            )  # fmt: skip
            inside = lower + 0.5 * torch.rand(1, inputs, generator=draw).to(dtype) * (upper - lower)
            constants = -(forms * inside).sum(-1) + 0.1 * scale * torch.randn(forms.shape[:3], generator=draw).to(dtype)
            box = Box(lower, upper)
            open_ = torch.rand(1, clauses, generator=draw) < 0.8
            part = cuts_of(box, forms, constants).clipped(box, open_)
            assert (part.lower >= lower).all() and (part.upper <= upper).all() and (part.lower <= part.upper).all()
            smaller += bool(((part.lower > lower) | (part.upper < upper)).any()) or bool(part.empty)
            points = [torch.stack(p) for p in itertools.product(*zip(lower[0], upper[0], strict=True))]
            points += list(lower + (upper - lower) * torch.rand(20, inputs, generator=draw).to(dtype))
            points += [inside[0]]
            for clause, line in itertools.product(range(clauses), range(lines)):
                form, constant = exact(forms[0, clause, line]), exact(constants[0, clause, line])[0]
                points += on_line(form, constant, exact(points[-1]), dtype)
                points += on_line(form, constant, exact(points[0]), dtype)
            for point in points:
                if not (((lower[0] <= point) & (point <= upper[0])).all()):
                    continue
                worst = min(
                    (
                        max(
                            sum((f * x for f, x in zip(exact(form), exact(point), strict=True)), exact(constant)[0])
                            for form, constant in zip(forms[0, clause], constants[0, clause], strict=True)
                        )
                        for clause in range(clauses) if open_[0, clause]
                    ),
                    default=Fraction(1),
                )  # fmt: skip
                held = not part.empty and bool(((part.lower[0] <= point) & (point <= part.upper[0])).all())
                assert held or worst > 0
                if not held and bool(open_.any()):
                    assert worst >= Fraction(float(part.level))
                kept, lost = kept + held, lost + (not held)
        assert kept and (kind == "point" or (smaller and lost))

    def test_what_one_line_leaves(self):
        """x - y + 0.5 <= 0 on the unit square: x in [0, 0.5], y in [0.5, 1]."""
        box = Box(torch.zeros(1, 2), torch.ones(1, 2))
        part = cuts_of(box, torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[0.5]]])).clipped(
            box, torch.tensor([[True]])
        )
        assert torch.allclose(part.lower, torch.tensor([[0.0, 0.5]]), atol=1e-3) and part.lower[0, 1] <= 0.5
        assert torch.allclose(part.upper, torch.tensor([[0.5, 1.0]]), atol=1e-3) and part.upper[0, 0] >= 0.5
        assert not part.empty and 0 < part.level < 1e-3

    def test_lines_that_exclude_each_other_leave_nothing(self):
        """x <= 0.4 and x >= 0.6 in one clause; another clause keeps its own part."""
        box = Box(torch.zeros(1, 1), torch.ones(1, 1))
        forms, constants = torch.tensor([[[[1.0], [-1.0]]]]), torch.tensor([[[-0.4, 0.6]]])
        assert cuts_of(box, forms, constants).clipped(box, torch.tensor([[True]])).empty
        forms, constants = torch.cat([forms, forms], 1), torch.cat([constants, torch.tensor([[[-0.1, -2.0]]])], 1)
        part = cuts_of(box, forms, constants).clipped(box, torch.tensor([[True, True]]))
        assert not part.empty and part.lower == 0 and 0.1 <= part.upper < 0.101

    def test_lines_of_no_use(self):
        """Infinite and NaN numbers, and no slope at all, cut nothing."""
        box = Box(torch.zeros(3, 1), torch.ones(3, 1))
        forms = torch.tensor([[[[0.0]]], [[[torch.nan]]], [[[torch.inf]]]])
        part = Cuts(forms, torch.full((3, 1, 1), -torch.inf)).clipped(box, torch.ones(3, 1, dtype=torch.bool))
        assert torch.equal(part.lower, box.lower) and torch.equal(part.upper, box.upper)
        assert not part.empty.any() and (part.level == torch.inf).all()


def network_problem(seed: int, kind: str, clauses: list[int]) -> Problem:
    """Boxes of three inputs, on parts of which the specification fails."""
    draw = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise([3, 8, 8, 2]):
        layer = nn.Linear(before, after)
        layer.weight.copy_(torch.randn(after, before, generator=draw) / before**0.5)
        layer.bias.copy_(0.3 * torch.randn(after, generator=draw))
        layers += [layer, nn.Tanh() if kind == "tanh" else nn.LeakyReLU(0.1) if kind == "leaky" else nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    lower = torch.randn(4, 3, generator=draw)
    region = Box(lower, lower + torch.rand(4, 3, generator=draw) * 0.5)
    rows = torch.randn(4, len(clauses), 2, generator=draw)
    specification = Specification(rows, torch.zeros(rows.shape[:2]), torch.tensor(clauses))
    margins = specification.worst(specification.values(model(region.images)))
    offsets = (0.05 * torch.rand(4, 1, generator=draw) - margins[:, None]).expand_as(rows[..., 0]).contiguous()
    return Problem(model, region, Specification(rows, offsets, specification.clauses), torch.arange(4))


class TestNetworks:
    @pytest.mark.parametrize("arithmetic", ["nearest", "real", "float32"])
    @pytest.mark.parametrize("kind", ["relu", "leaky", "tanh"])
    @pytest.mark.parametrize("clauses", [[0], [0, 0], [0, 1, 0]])
    def test_no_counterexample_is_lost(self, kind, arithmetic, clauses):
        if kind == "tanh" and arithmetic != "nearest":
            pytest.skip("roundings of tanh are not bounded")
        smaller = wrong = 0
        for seed in range(6):
            problem = network_problem(seed, kind, clauses)
            exact_network = fold(problem.network, torch.Size([3]), dtype=torch.float64)
            known = unknown(problem)
            if arithmetic != "nearest":
                network = replace(exact_network, rounding=REAL if arithmetic == "real" else FLOAT32)
                known = BoundsSoFar(network, known.rows.double(), {})
            bounder = BoxBounder(problem, known, 8)
            zeros = torch.zeros(4, dtype=torch.long)
            nothing = torch.full((4,), -torch.inf, dtype=known.rows.dtype)
            lower, upper = (end.to(known.rows.dtype) for end in (problem.region.lower, problem.region.upper))
            boxes = Boxes(torch.arange(4), zeros, nothing, zeros - 1, lower, upper, zeros, -nothing)
            found = bounder.bound(boxes)
            some = found.subproblems
            smaller += int(((some.lower > lower) | (some.upper < upper)).flatten(1).any(1).sum())
            shares = torch.cat([torch.rand(3000, 3), torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)]).double()
            for number in range(4):
                ends = lower[number].double(), upper[number].double()
                points = (ends[0] + shares * (ends[1] - ends[0])).clamp(*ends)
                one = problem.specification.subset(torch.full((len(points),), number))
                margins = one.worst(one.values(exact_network(points)))
                held = ((some.lower[number] <= points) & (points <= some.upper[number])).all(1)
                if some.bound[number] > 0:
                    assert (margins > 0).all()
                assert (held | (margins > 0)).all()
                assert (held | (margins >= float(some.level[number]) - 1e-6)).all()
                wrong += int((margins <= 0).sum())
        assert smaller >= 3 and wrong

    def test_boxes_are_saved(self, monkeypatch):
        """The same answers from fewer boxes than without clipping."""
        original, counts = BoxBounds.__call__, list[int]()

        def counted(self, box, image):
            counts[-1] += len(image)
            return original(self, box, image)

        def whole(self, box, open_):
            nothing = torch.zeros(len(open_), dtype=torch.bool)
            return Part(box.lower, box.upper, nothing, torch.full_like(self.least[:, 0, 0], torch.inf))

        monkeypatch.setattr(BoxBounds, "__call__", counted)
        answers = []
        for change in (None, whole):
            if change is not None:
                monkeypatch.setattr(Cuts, "clipped", change)
            counts.append(0)
            answers.append([search(network_problem(seed, "relu", [0, 0])).proved.tolist() for seed in range(6)])
        assert answers[0] == answers[1] and counts[0] < counts[1]


def search(problem: Problem) -> SearchOutcome:
    """Boxes whose least margin is about 0.02."""
    region, specification = problem.region, problem.specification
    shares = torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * 3)
    points = [region.lower + share * (region.upper - region.lower) for share in shares]
    least = [specification.worst(specification.values(problem.network(point))) for point in points]
    offsets = specification.offsets + 0.02 - torch.stack(least).amin(0)[:, None]
    problem = replace(problem, specification=Specification(specification.rows, offsets, specification.clauses))
    known = unknown(problem)
    known = known.with_bounds(crown_bounds(known.network, known.region_of(problem)))
    return split_inputs(problem, known, 60.0, lambda number, point: False)
