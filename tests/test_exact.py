"""LP, MILP, linear bounds and planted networks against each other and against brute force."""

import itertools
import math
from types import SimpleNamespace

import pytest
import scipy.optimize
import torch
from milp_oracle import minimum
from planted import KINDS, random_network
from torch import nn

from certtrain.bounds import Bounds, L2Ball, LinfBall, Network, Region
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.errors import InputError
from certtrain.verifiers import Specification
from certtrain.verifiers.lp import leaf_program, solve_leaf
from certtrain.verifiers.neurons import Neurons

FINE = 1e-5  # HiGHS meets each constraint to 1e-6


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def small_case(seed: int, kind: str, epsilon: float = 0.2) -> tuple[Network, Region]:
    """A random network with 2 to 3 logits over a box around a random image."""
    draw = torch.Generator().manual_seed(seed)
    shape = torch.Size((1, 3, 3) if kind in ("conv", "residual", "max_pool") else (1, 1, 2 + seed % 3))
    model = random_network(kind, shape, 2 + seed % 2, draw, 1.0)
    image = torch.rand(1, *shape, generator=draw, dtype=torch.float64)
    return fold(model, shape, dtype=torch.float64), LinfBall(epsilon).region(image)


def samples(region: Region, count: int, seed: int = 0) -> torch.Tensor:
    """Random points of the box, half of them with most coordinates at an end; all its vertices where they are few."""
    draw, hull = torch.Generator().manual_seed(seed), region.hull
    share = 2 * torch.rand(count, *region.images.shape[1:], generator=draw, dtype=torch.float64) - 1
    share[::2] = (3 * share[::2]).clamp(-1, 1)
    size = region.images[0].numel()
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)) if size < 10 else [[1.0] * size])
    share = torch.cat([share, corners.double().reshape(-1, *region.images.shape[1:])])
    return region.ball.project(region.images, hull.center + share * hull.radius)


def inputs_of(network: Network, points: torch.Tensor) -> torch.Tensor:
    """(B, N) of the neurons."""
    values = network.values(points)
    return torch.cat([values[network.operations[place].inputs[0]].flatten(1) for place in network.nonlinear], 1)


def ends(network: Network, bounds: dict[int, Bounds]) -> tuple[torch.Tensor, torch.Tensor]:
    neurons = Neurons.of(network)
    return tuple(neurons.together({k: getattr(b, end) for k, b in bounds.items()})[0] for end in ("lower", "upper"))


def leaf_of(network: Network, bounds: dict[int, Bounds], signs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(lower, upper, signs) of the leaf in which neurons have ``signs``, of which those that are open are assumed."""
    lower, upper = ends(network, bounds)
    signs = torch.where((lower < 0) & (upper > 0), signs, 0).to(torch.int8)
    return torch.where(signs > 0, 0.0, lower), torch.where(signs < 0, 0.0, upper), signs


def identity(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.eye(count, dtype=torch.float64)[None], torch.zeros(1, count, dtype=torch.float64)


def few_open(kind: str) -> tuple[Network, Region, dict[int, Bounds]]:
    """A network with 4 to 7 open neurons."""
    for seed in range(200):
        network, region = small_case(seed, kind, epsilon=0.05 + 0.05 * (seed % 5))
        bounds = crown_bounds(network, region)
        lower, upper = ends(network, bounds)
        if 4 <= int(((lower < 0) & (upper > 0)).sum()) <= 7:
            return network, region, bounds
    raise AssertionError(kind)


class TestLeaves:
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_leaves_together_are_the_mixed_integer_program(self, kind):
        network, region, bounds = few_open(kind)
        lower, upper = ends(network, bounds)
        unit = ((lower < 0) & (upper > 0)).nonzero().flatten()
        row = identity(network.shapes[-1][0])[0][0, 0]
        points = samples(region, 4000)
        inputs, values = inputs_of(network, points), network(points) @ row + 0.25
        best, empty = math.inf, 0
        for choice in itertools.product((-1, 1), repeat=len(unit)):
            signs = torch.zeros(len(lower), dtype=torch.int8)
            signs[unit] = torch.tensor(choice, dtype=torch.int8)
            leaf = solve_leaf(network, region, row[None], torch.tensor([0.25]), *leaf_of(network, bounds, signs))
            inside = (inputs * signs >= 0).all(1)
            assert not (leaf.infeasible and inside.any())
            assert (values[inside] >= leaf.bound).all()
            best, empty = min(best, leaf.bound), empty + leaf.infeasible
            if leaf.infeasible:
                assert leaf.bound == math.inf and leaf.point is None
                continue
            assert region.ball.contains(region.images, leaf.point[None]).all()
            assert (inputs_of(network, leaf.point[None]) * signs >= -FINE).all()  # not proved empty: here is a point
            assert float(network(leaf.point[None])[0] @ row) + 0.25 == pytest.approx(leaf.bound, abs=FINE)
        exact = minimum(network, region, row[None, None], torch.full((1, 1), 0.25), bounds)
        assert best == pytest.approx(float(exact.values), abs=FINE) and exact.optimal.all()
        assert empty > 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_multipliers_lift_the_lagrangian_above_the_minimum(self, kind):
        for seed in range(8):
            network, region = small_case(seed, kind, 0.3)
            points = samples(region, 3000, seed)
            inputs, bounds = inputs_of(network, points), crown_bounds(network, region)
            row, offset = torch.randn(network.shapes[-1][0], dtype=torch.float64), torch.tensor([0.7]).double()
            program = leaf_program(network, region, row[None], offset, *leaf_of(network, bounds, inputs[0].sign()))
            inside = (inputs * leaf_of(network, bounds, inputs[0].sign())[2] >= 0).all(1)
            least = float((network(points[inside]) @ row).min() + offset)
            tight = program.solve().bound
            assert inside[0] and tight <= least
            for size in (0.0, 1e-3, 1.0, 1e3, 1e12, 1e308):
                for weights in size * torch.randn(10, len(program.constants), dtype=torch.float64):
                    weights[1::7] = math.nan
                    weights[0] = 0.0
                    assert program.lagrangian(weights) <= 0  # the leaf is not empty
                    weights[0] = 1.0
                    assert program.lagrangian(weights) <= min(least, tight + FINE)

    @pytest.mark.parametrize(("status", "phase_one"), [(0, 0), (2, 0), (2, 2), (4, 0), (1, 1)])
    def test_a_lying_solver_costs_tightness_alone(self, status, phase_one, monkeypatch):
        def liar(cost, rows, limits, **options):
            found = torch.randn(len(cost) + len(limits), dtype=torch.float64).numpy()
            said = phase_one if (0.0, None) in options["bounds"] else status
            multipliers = SimpleNamespace(marginals=-100 * found[len(cost) :])
            return SimpleNamespace(status=said, x=found[: len(cost)], ineqlin=multipliers)

        torch.manual_seed(status)
        monkeypatch.setattr(scipy.optimize, "linprog", liar)
        for seed in range(20):
            network, region = small_case(seed, "dense")
            points = samples(region, 500)
            inputs, row = inputs_of(network, points), torch.ones(network.shapes[-1][0], dtype=torch.float64)
            lower, upper, signs = leaf_of(network, crown_bounds(network, region), inputs[0].sign())
            leaf = solve_leaf(network, region, row[None], torch.zeros(1), lower, upper, signs)
            assert not leaf.infeasible and leaf.bound <= float(network(points[:1])[0] @ row)
            assert leaf.point is None or region.ball.contains(region.images, leaf.point[None]).all()

    def test_open_neurons_are_relaxed(self):
        network, region = small_case(3, "residual", 0.3)
        bounds = crown_bounds(network, region)
        lower, upper = ends(network, bounds)
        rows, _ = identity(network.shapes[-1][0])
        none = torch.zeros(len(lower), dtype=torch.int8)
        leaf = solve_leaf(network, region, rows[0, 1:2], torch.zeros(1), lower, upper, none)
        assert leaf.bound == pytest.approx(float(bound_forms(network, region, rows, bounds)[0, 1]), abs=1e-9)

    def test_numbers_that_overflow_prove_nothing(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
        for parameter in model.parameters():
            parameter.fill_(1e200)
        network = fold(model, torch.Size((1, 1, 2)))
        region = LinfBall(0.1).region(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64))
        lower, upper, signs = (
            torch.zeros(2).double(),
            torch.full((2,), 1e201, dtype=torch.float64),
            torch.ones(2, dtype=torch.int8),
        )
        leaf = solve_leaf(network, region, torch.ones(1, 1).double(), torch.zeros(1), lower, upper, signs)
        assert leaf.bound == -math.inf and not leaf.infeasible

    def test_only_a_box_around_one_double_image(self):
        network, region = small_case(0, "dense")
        lower, upper = ends(network, crown_bounds(network, region))
        signs = torch.zeros(len(lower), dtype=torch.int8)
        for ball, images in [
            (L2Ball(0.1), region.images), (LinfBall(0.1), region.images.float()),
            (LinfBall(0.1), region.images.repeat(2, 1, 1, 1)),
        ]:  # fmt: skip
            with pytest.raises(InputError, match="accepted for a linear program: a box"):
                solve_leaf(network, ball.region(images), identity(2)[0][0, :1], torch.zeros(1), lower, upper, signs)
            with pytest.raises(InputError, match="accepted for a linear program: a box"):
                minimum(network, ball.region(images), *identity(2), {})


class TestMixedIntegerProgram:
    @pytest.mark.parametrize("kind", KINDS)
    def test_no_point_is_below_and_the_minimiser_attains_it(self, kind):
        for seed in range(5):
            network, region = small_case(seed, kind)
            rows, offsets = identity(network.shapes[-1][0])
            bounds = crown_bounds(network, region)
            exact = minimum(network, region, rows, offsets + 0.5, bounds)
            assert exact.optimal.all() and region.ball.contains(region.images, exact.points).all()
            attained = network(exact.points).diagonal() + 0.5
            assert torch.allclose(attained, exact.values) and (exact.bounds - exact.values).abs().max() < FINE
            assert (network(samples(region, 3000)).amin(0) + 0.5 >= exact.bounds - FINE).all()
            for found in (bounds, interval_bounds(network, region)):
                assert (bound_forms(network, region, rows, found)[0] + 0.5 <= exact.values + FINE).all()

    def test_a_grid_comes_as_near_as_its_spacing(self):
        for seed in (0, 3, 6, 9):  # two inputs
            network, region = small_case(seed, "dense")
            ticks = torch.linspace(-1, 1, 301, dtype=torch.float64)
            share = torch.cartesian_prod(ticks, ticks).reshape(-1, 1, 1, 2)
            values = network(region.hull.center + share * region.hull.radius)
            exact = minimum(network, region, *identity(values.shape[1]), crown_bounds(network, region))
            assert (values.amin(0) >= exact.bounds - FINE).all() and (values.amin(0) <= exact.values + 0.01).all()

    def test_a_clause_is_the_largest_of_its_rows(self):
        for seed in range(6):
            network, region = small_case(seed, "leaky")
            rows = torch.randn(1, 5, network.shapes[-1][0], dtype=torch.float64)
            offsets, clauses = torch.randn(1, 5, dtype=torch.float64), torch.tensor([1, 0, 1, 2, 0])
            exact = minimum(network, region, rows, offsets, crown_bounds(network, region), clauses=clauses)
            points = torch.cat([exact.points, samples(region, 2000)])
            values = Specification(rows, offsets, clauses).values(network(points))
            for clause in range(3):
                largest = values[:, clauses == clause].amax(1)
                assert largest.min() >= exact.bounds[clause] - FINE
                assert exact.values[clause] == pytest.approx(float(largest[clause]), abs=1e-12)
                assert exact.values[clause] == pytest.approx(float(exact.bounds[clause]), abs=FINE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_bounds_contain_the_neurons_exact_ranges(self, kind):
        """By a program that takes nothing from the bounds but generous big-M constants: every unit has its binary."""
        network, region = small_case(7, kind, 0.1)
        tight, loose = crown_bounds(network, region), interval_bounds(network, region)
        generous = {place: Bounds(b.lower.clamp(max=0) - 1, b.upper.clamp(min=0) + 1) for place, b in loose.items()}
        for place in network.nonlinear:
            read = network.operations[place].inputs[0]
            units, none = identity(network.shapes[read].numel())
            units, none = units[:, :6], none[:, :6]
            low = minimum(network, region, units, none, generous, position=read).values
            high = -minimum(network, region, -units, none, generous, position=read).values
            for found in (tight[place], loose[place]):
                assert (found.lower.flatten()[:6] <= low + FINE).all()
                assert (found.upper.flatten()[:6] >= high - FINE).all()

    def test_out_of_time_it_answers_with_the_image(self):
        network, region = small_case(1, "residual", 0.5)
        exact = minimum(network, region, *identity(3), crown_bounds(network, region), time_limit=0.0)
        assert not exact.optimal.any() and torch.equal(exact.points, region.images.expand_as(exact.points))
        assert torch.allclose(exact.values, network(region.images)[0])

    def test_smooth_functions_are_refused(self):
        network = fold(nn.Sequential(nn.Flatten(), nn.Sigmoid()), torch.Size((1, 1, 2)), dtype=torch.float64)
        region = LinfBall(0.1).region(torch.zeros(1, 1, 1, 2, dtype=torch.float64))
        with pytest.raises(InputError, match="smooth activation; accepted"):
            minimum(network, region, *identity(2), interval_bounds(network, region))
