"""Branch and bound on the ReLUs of networks that hold other functions too: never a proof of what is false."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from networks import Apply, Residual
from problems import alone, problem_of, unknown
from test_mixed_search import MIXES
from torch import Tensor, nn
from walking import walk

import certtrain
from certtrain.bounds import Bounds, Box, LinfBall
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.overflow import fits
from certtrain.verifiers import Certify
from certtrain.verifiers.bounds_so_far import BoundsSoFar
from certtrain.verifiers.neuron_split import RELAXED, LinearProgramSolver, SignBounder, SignSplitter
from certtrain.verifiers.neurons import Columns, Neurons
from certtrain.verifiers.problem import Problem
from certtrain.verifiers.search import Search
from certtrain.verifiers.sign_space import SignSpace, SignSubproblems
from certtrain.verifiers.stages import AlphaStage, BabStage
from certtrain.verifiers.tighter_bounds import tightened

KINDS = {
    **MIXES,
    "gelu": Apply(lambda _, x: x.relu() - torch.nn.functional.gelu(x.flip(1))),
    "leaky": Apply(lambda _, x: nn.functional.leaky_relu(x, 0.2) * torch.sigmoid(x)),
    "softmax of products": Apply(lambda _, x: torch.softmax(x.relu() * x.flip(1), -1) + x.relu()),
}  # fmt: skip


def random_model(kind: str, seed: int) -> nn.Module:
    """(B, 1, 1, 2) → (B, 3)."""
    torch.manual_seed(seed)
    layers = nn.Flatten(), nn.Linear(2, 8), copy.deepcopy(KINDS[kind]), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)
    model = nn.Sequential(*layers)
    model[1].weight.data *= 3
    return model.requires_grad_(False).eval()


def points(problem: Problem, side: int = 41) -> Tensor:
    """(side², B, *shape) points of each problem's box, its corners among them."""
    steps = torch.linspace(0, 1, side, dtype=problem.region.images.dtype)
    shares = torch.cartesian_prod(steps, steps).reshape(-1, 1, 1, 1, 2)
    hull = problem.region.hull
    return hull.lower + shares * (hull.upper - hull.lower)


def least(problem: Problem, samples: Tensor) -> Tensor:
    """(B,) the least margin at the samples."""
    values = [problem.specification.worst(problem.specification.values(problem.network(x))) for x in samples]
    return torch.stack(values).amin(0)


def a_problem(kind: str, seed: int, epsilon: float, count: int = 3) -> Problem:
    model, images = random_model(kind, seed), torch.rand(count, 1, 1, 2)
    return problem_of(model, images, model(images).argmax(1), LinfBall(epsilon), 3)


def in_double(problem: Problem) -> tuple[Problem, SignSpace]:
    """The problem in float64, and the space of its search."""
    region = problem.region.to(torch.float64)
    problem = replace(problem, network=problem.network.double(), region=region)
    known = unknown(problem, fold(problem.network, region.images.shape[1:], dtype=torch.float64))
    return problem, SignSpace(problem, known.with_bounds(crown_bounds(known.network, region)))


def searched(problem: Problem, search: Search | None = None):
    return alone(BabStage(search or Search(most=40), timeout=20.0), problem)


@walk("kind", KINDS)
def test_verdicts_agree_with_samples(kind):
    for seed, epsilon in enumerate((0.02, 0.08, 0.3)):
        problem = a_problem(kind, seed, epsilon)
        known, worst = searched(problem), least(problem, points(problem))
        assert known.lower is not None
        for number, status in enumerate(known.statuses):
            assert float(known.lower[number]) <= float(worst[number]) + 1e-5
            if status == "falsified":
                point = known.counterexamples[number][None]
                assert problem.region.take(torch.tensor([number])).contains(point).all()
                assert problem.network(point).argmax() != problem.specification.labels[number]
            elif status is None:
                assert known.reasons[number] in (RELAXED, "40 splits")
            else:
                assert status == "timeout" or float(worst[number]) > 0


@walk("kind", KINDS)
def test_a_planted_counterexample_is_never_missed(kind):
    """The least sampled margin is moved to just below 0; a network that is safe by far is no obstacle."""
    proved = 0
    for seed in range(4):
        problem = a_problem(kind, seed, 0.05, count=1)
        label = int(problem.specification.labels[0])
        margin, bias = float(least(problem, points(problem))[0]), problem.network[-1].bias
        bias[label] -= margin + 1e-4
        assert searched(problem).statuses != ["verified"]
        bias[label] += 0.05
        proved += searched(problem).statuses == ["verified"]
    assert proved


@walk("kind", KINDS)
@walk("clip", [False, True])
def test_bounds_hold_in_every_subproblem(kind, clip):
    """Under the signs that a point has, bounds hold at this point: of the row and of all neurons' inputs."""
    signed = False
    for seed, epsilon in enumerate((0.1, 0.4)):
        problem, space = in_double(a_problem(kind, seed, epsilon, count=1))
        network = space.network
        bounder = SignBounder(space, Search(), recording=False)
        if clip:
            space.tighten(torch.tensor([0]), 3)
            assert space.lines and not space.reduced
        roots = space.restored(space.roots())
        if not len(roots):
            continue
        draw = torch.Generator().manual_seed(seed)
        for point in points(problem, 5):
            values = network.values(point)
            inputs = torch.cat(
                [values[i].flatten() for p in space.neurons.places for i in network.operations[p].inputs]
            )
            own = space.columns.gathered(inputs[None], 0.0)
            assumed = space.undecided(roots) & (torch.rand(own.shape, generator=draw) < 0.7)
            signed |= bool(assumed.any())
            some = replace(roots, signs=torch.where(assumed, torch.where(own >= 0, 1, -1), 0).to(torch.int8))
            for _ in range(2):  # the second time from the first's bounds
                some = bounder.bound(some).subproblems
                values_of_rows = problem.specification.values(values[-1])[0]
                reached = torch.stack([values_of_rows[space.clauses[goal]].max() for goal in some.goal])
                below = (reached < some.level) | some.level.isinf()
                assert (some.bound <= reached + 1e-9).all()
                for number in below.nonzero().flatten():
                    real = space.columns.real[0]
                    assert (some.lower[number] <= own[0] + 1e-9)[real].all()
                    assert (own[0] - 1e-9 <= some.upper[number])[real].all()
                    assert (some.signs[number] * own[0] >= -1e-9)[real].all()
            check_program(space, network, some, reached, below)
    assert signed


def check_program(space: SignSpace, network, some: SignSubproblems, reached: Tensor, below: Tensor) -> None:
    solver = LinearProgramSolver(space, network, 64)
    assert solver.ends_search
    for number in below.nonzero().flatten():
        one = some.take(number[None])
        solution = solver._program(one, space.linear(one))
        assert not solution.infeasible and solution.bound <= float(reached[number]) + 1e-9


@walk("kind", KINDS)
def test_only_relus_are_split(kind):
    problem = a_problem(kind, 0, 0.3, count=1)
    known = unknown(problem)
    space = SignSpace(problem, known.with_bounds(crown_bounds(known.network, problem.region)))
    places = torch.tensor([known.network.nonlinear_at(place).piecewise_linear for place in space.neurons.places])
    of_column = torch.repeat_interleave(places, torch.tensor(space.columns.sizes))
    assert torch.equal(space.signed, of_column) and of_column.any() and not of_column.all()
    bounded = SignBounder(space, Search(), recording=False).bound(space.restored(space.roots()))
    assert not bounded.subproblems.signs[:, ~of_column].any()
    options = SignSplitter(space, Search()).options(bounded)
    assert (options[:, ~of_column] == -torch.inf).all() and (options[:, of_column] > -torch.inf).any()


@walk("kind", KINDS)
def test_bounds_of_neurons_are_tightened(kind):
    """Those of whole images, ascents over operations that read products among them."""
    for seed in range(3):
        problem, space = in_double(a_problem(kind, seed, 0.2))
        network = space.network
        found, _ = tightened(network, space.region, space.known.bounds, space.columns, steps=3)
        for point in points(problem, 11):
            values = network.values(point)
            for place, bounds in found.items():
                ends = network.split_bounds(place, bounds)
                for read, own in zip(network.operations[place].inputs, ends, strict=True):
                    assert (own.lower - 1e-9 <= values[read]).all() and (values[read] <= own.upper + 1e-9).all()


@walk("seed", [15, 67, 76])
@walk("function", [torch.exp, lambda z: z * z.flip(1)])
def test_ends_that_rounding_crosses_are_put_right(seed, function):
    """Over crossed ends lines are NaN or infinite: nothing was proved, or, by an infinite lower bound, everything."""
    torch.manual_seed(seed)
    branch = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    layers = Residual(branch), nn.ReLU(), nn.Linear(8, 8), Apply(lambda _, x: function(x)), nn.Linear(8, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), *layers).requires_grad_(False).eval()
    images = torch.rand(1, 1, 1, 4)
    region, network = Box(images - 3e-8, images + 3e-8), fold(model, torch.Size([1, 1, 4]))
    bounds = crown_bounds(network, region)
    (place,) = (place for place in network.nonlinear if not network.nonlinear_at(place).piecewise_linear)
    assert (bounds[place].lower <= bounds[place].upper).all()
    lower, logits = bound_forms(network, region, torch.eye(2)[None], bounds), model(images)
    assert (lower <= logits + 1e-5).all() and (lower >= logits - 1e-4).all()
    neurons = Neurons.of(network)
    columns = Columns.of(neurons, neurons.open(network, bounds, images))
    found, lines = tightened(network, region, bounds, columns, steps=3, room=1 << 20)
    assert (found[place].lower <= found[place].upper).all()
    assert all(own.constants.isfinite().all() for own in lines)
    known = BoundsSoFar(network, torch.zeros(1, 2), bounds)
    moved = {at: Bounds(own.upper + 1e-7, own.upper + 1e-7) for at, own in bounds.items()}
    assert all((own.lower <= own.upper).all() for own in known.with_bounds(moved).bounds.values())


def test_the_size_of_log_sum_exp_has_its_shape():
    """The check for overflow carries sizes through the network; the sum of a row has one."""
    model = Apply(lambda _, x: x.flatten(1).relu() - torch.logsumexp(x.flatten(1), -1, keepdim=True))
    images = torch.rand(2, 1, 1, 4)
    network = fold(nn.Sequential(model, nn.Linear(4, 3)).eval(), images.shape[1:])
    (place,) = (place for place in network.nonlinear if not network.nonlinear_at(place).piecewise_linear)
    operation, values = network.nonlinear_at(place), network.values(100 * images)
    (read,) = operation.inputs
    assert operation.magnitude(values[read]).shape == values[place].shape
    assert (values[place].abs() <= operation.magnitude(values[read].abs())).all()
    region = LinfBall(0.01).region(images)
    assert fits(network, region, crown_bounds(network, region)).all()


def tied(function: Callable[[Tensor], Tensor], margin: float) -> Problem:
    """relu(t) - relu(-t) - t is 0, but only when both signs are known; ``function`` of it is added to the margin."""

    def logits(module, x: Tensor) -> Tensor:
        t = x.flatten(1) - 0.5
        zero = t.relu() - (-t).relu() - t
        return torch.cat([margin + zero + function(zero), t * 0.0], 1)

    return problem_of(Apply(logits).eval(), torch.full((1, 1, 1, 1), 0.45), torch.tensor([0]), LinfBall(0.2), 2)


@walk("function", [nn.functional.gelu, torch.sigmoid, torch.tanh, lambda z: z * torch.cos(z)])
def test_it_proves_what_alpha_leaves_open(function):
    """The smooth function's relaxation is narrow only where its input's bounds are recomputed under all signs."""
    value = float(function(torch.zeros(1, 1)))
    problem = tied(function, 0.01 - value)
    assert alone(AlphaStage(), problem).statuses == [None]
    finding = searched(problem)
    assert finding.statuses == ["verified"] and 0 < float(finding.lower) <= 0.01 + 1e-6
    assert finding.search[0].children <= 6
    assert searched(tied(function, -0.01 - value)).statuses == ["falsified"]


class TestIncomplete:
    def test_what_no_split_proves_stays_open_with_a_reason(self):
        """gelu(t) - gelu(-t) - t is 0 everywhere, which no sign of a ReLU shows."""

        def logits(module, x: Tensor) -> Tensor:
            t = 4 * (x.flatten(1) - 0.5)
            zero = nn.functional.gelu(t) - nn.functional.gelu(-t) - t
            return torch.cat([1e-3 + zero + 1e-3 * t.relu(), t * 0.0], 1)

        problem = problem_of(Apply(logits).eval(), torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), LinfBall(0.2), 2)
        finding = searched(problem)
        assert finding.statuses == [None] and finding.reasons == [RELAXED]
        assert finding.lower is not None and float(finding.lower) <= 0
        for stages, expected in ((("bab",), "unknown"), (("bab", "input_split"), "verified")):
            settings, labels = Certify(stages=stages, timeout=20.0), problem.specification.labels
            (verdict,) = certtrain.certify(problem.network, problem.region.images, labels, 0.2, settings)
            assert verdict.status == expected and (verdict.reason == RELAXED) is (expected == "unknown")

    def test_networks_without_relus_are_left(self):
        problem = tied(nn.functional.gelu, 0.1)
        smooth = nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.GELU(), nn.Linear(4, 2)).eval()
        finding = alone(BabStage(), replace(problem, network=smooth))
        assert finding.statuses == [None] and "splits ReLUs" in finding.reasons[0]


@walk("kind", KINDS)
def test_a_search_repeats_itself(kind):
    problem = a_problem(kind, 2, 0.15)
    first, second = (searched(problem) for _ in range(2))
    assert first.statuses == second.statuses and first.reasons == second.reasons
    assert torch.equal(first.lower, second.lower)
    assert [s.record() for s in first.search] == [s.record() for s in second.search]
