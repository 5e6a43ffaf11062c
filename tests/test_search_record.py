"""The tree that a search leaves behind proves what the search says: its leaves cover the root, and the bound of each is
computed again from decisions, slopes and multipliers."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from milp_oracle import minimum
from planted import planted_pair, random_network
from problems import problem_of, unknown
from torch import nn

from certtrain.bounds import Bounds, Box, LinfBall, SparseBall
from certtrain.bounds.crown import backward, crown_bounds, relax_all
from certtrain.bounds.folding import fold
from certtrain.bounds.sparse_part import SparsePart
from certtrain.verifiers import Judge, Problem, Search, Specification
from certtrain.verifiers.bounds_so_far import BoundsSoFar
from certtrain.verifiers.box_bounds import BoxBounds, ClauseBounds
from certtrain.verifiers.engine import SearchOutcome
from certtrain.verifiers.input_split import split_inputs
from certtrain.verifiers.lp import leaf_program
from certtrain.verifiers.neuron_split import split_neurons
from certtrain.verifiers.neurons import Neurons
from certtrain.verifiers.optimise import Subproblems, maximise
from certtrain.verifiers.problem import rows_of_clauses
from certtrain.verifiers.search_record import (
    Clip,
    Clipped,
    Concretised,
    CrossedBounds,
    Multipliers,
    RecordedSubproblem,
    Relaxed,
    Searched,
    SearchRecord,
    Sign,
    Unsatisfiable,
)
from certtrain.verifiers.sparse_split import split_locations

FINE = 1e-9  # all in float64
SEARCHES = {
    "default": Search(),
    "without bounding anew": Search(tighten=False, steps=2),
    "leaves by programs": Search(steps=0, tighten=False),
    "looking ahead": Search(candidates=3, batch=2),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def doubled(problem: Problem) -> Problem:
    region = problem.region.ball.region(problem.region.images.double())
    return replace(problem, network=problem.network.double(), region=region)


def random_problem(seed: int, kind: str, count: int = 3, epsilon: float = 0.3) -> Problem:
    """Images that a random network gets right, in float64."""
    draw = torch.Generator().manual_seed(seed)
    shape = torch.Size((1, 3, 3) if kind in ("conv", "residual", "max_pool") else (1, 1, 2 + seed % 3))
    model = random_network(kind, shape, 2 + seed % 2, draw, 1.0).eval()
    images = torch.rand(count, *shape, generator=draw)
    return doubled(problem_of(model, images, model(images).argmax(1), LinfBall(epsilon), 2 + seed % 2))


def tight_problem(seed: int, kind: str) -> Problem:
    """A dense network of 12 neurons, and clauses of up to two rows whose least margin is 0.05 (one image: -0.05)."""
    draw = torch.Generator().manual_seed(seed)
    inputs = 2 + seed % 3
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((inputs, 6), (6, 6), (6, 3)):
        layer = nn.Linear(before, after)
        layer.weight.copy_(1.5 * torch.randn(after, before, generator=draw) / before**0.5)
        layer.bias.copy_(0.3 * torch.randn(after, generator=draw))
        layers += [layer, nn.ReLU() if kind == "dense" else nn.LeakyReLU(0.1)]
    images = torch.rand(3, 1, 1, inputs, generator=draw)
    rows = torch.randn(3, 3, 3, generator=draw)
    clauses = torch.tensor([0, 1, 0] if seed % 2 else [0, 1, 2])
    specification = Specification(rows, torch.zeros(3, 3), clauses)
    model = nn.Sequential(*layers[:-1]).eval()
    problem = doubled(Problem(model, LinfBall(0.4).region(images), specification, torch.arange(3)))
    wanted = torch.tensor([0.05, 0.05, -0.05])
    offsets = wanted - torch.tensor([least_margin(problem, number) for number in range(3)])
    return replace(problem, specification=replace(specification, offsets=offsets[:, None].repeat(1, 3)))


def planted_twin(seed: int, kind: str) -> Problem:
    case, twin = planted_pair(seed, kind)
    classes = int(case.model(case.image[None]).shape[1])
    return doubled(
        problem_of(twin.model, twin.image[None], torch.tensor([twin.label]), LinfBall(twin.epsilon), classes)
    )


def searched(
    problem: Problem, search: Search, record: SearchRecord | None, **limits
) -> tuple[SearchOutcome, BoundsSoFar]:
    network = fold(problem.network, problem.region.images.shape[1:], dtype=torch.float64)
    known = unknown(problem, network)
    known = known.with_bounds(crown_bounds(network, known.region_of(problem)))
    judge = Judge()
    found = split_neurons(
        problem, known, network, search, limits.get("timeout", 60.0),
        lambda number, point: judge(problem, number, point), record,
    )  # fmt: skip
    return found, known


def assert_covered_by_signs(record: SearchRecord, image: int, clauses: int) -> None:
    """From every clause's root each subproblem is a leaf, or is split into both signs of one more neuron."""
    assert [root.goal for root in record.roots(image)] == list(range(clauses))
    for one in record.subproblems:
        if one.image != image or not one.children:
            continue
        children = [record.subproblems[number] for number in one.children]
        assert all(child.goal == one.goal and child.parent == one.number for child in children)
        neurons = {child.decision.neuron for child in children}
        assert len(children) == 2 and len(neurons) == 1 and {child.decision.sign for child in children} == {1, -1}
        assert not neurons & {above.decision.neuron for above in record.path(one) if above.decision is not None}
        assert one.reason is None and one.proof is None


class Plain:
    """CROWN of a chain of dense layers and kinks for one box, in numpy, by its definition."""

    def __init__(self, model: nn.Sequential, lower: np.ndarray, upper: np.ndarray):
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        self.affine = [(layer.weight.numpy(), layer.bias.numpy()) for layer in layers]
        kinks = {getattr(layer, "negative_slope", 0.0) for layer in model if isinstance(layer, nn.ReLU | nn.LeakyReLU)}
        assert len(kinks) == 1 and len(model) == 2 * len(layers)  # nothing else but a Flatten
        (self.kink,) = kinks
        self.lower, self.upper = lower, upper
        self.sizes = [len(bias) for _, bias in self.affine[:-1]]

    def apart(self, flat: np.ndarray) -> list[np.ndarray]:
        return np.split(flat, np.cumsum(self.sizes)[:-1])

    def carried(self, form, depth: int, low, up, slopes=None, pushed=None) -> tuple[np.ndarray, float]:
        """form · (output of affine layer ``depth``) >= the result · x + constant."""
        constant = 0.0
        for number in range(depth, -1, -1):
            weight, bias = self.affine[number]
            constant, form = constant + form @ bias, form @ weight
            if number:
                below, above = low[number - 1], up[number - 1]
                positive, unstable = below >= 0, (below < 0) & (above > 0)
                fixed = np.where(positive, 1.0, self.kink)
                chord = (above - self.kink * below) / np.where(unstable, above - below, 1.0)
                free = np.where(above > -below, 1.0, self.kink) if slopes is None else slopes[number - 1]
                line = np.where(unstable, np.clip(free, self.kink, 1.0), fixed)
                height = np.where(unstable, above - chord * above, 0.0)
                constant += np.minimum(form, 0) @ height
                form = np.maximum(form, 0) * line + np.minimum(form, 0) * np.where(unstable, chord, fixed)
                form = form if pushed is None else form + pushed[number - 1]
        return form, constant

    def least(self, form: np.ndarray, constant: float) -> float:
        return float(form @ ((self.lower + self.upper) / 2) - np.abs(form) @ ((self.upper - self.lower) / 2) + constant)

    def bounds(self, given: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of all neurons' inputs: intervals, and linear ones of those that these leave open."""
        low, up, below, above = [], [], self.lower, self.upper
        for depth, size in enumerate(self.sizes):
            weight, bias = self.affine[depth]
            positive, negative = np.maximum(weight, 0), np.minimum(weight, 0)
            least, most = positive @ below + negative @ above + bias, positive @ above + negative @ below + bias
            if given is not None:
                least, most = (
                    np.maximum(least, self.apart(given[0])[depth]),
                    np.minimum(most, self.apart(given[1])[depth]),
                )
            for unit in range(size if depth else 0):
                if least[unit] < 0 < most[unit]:
                    form = np.eye(size)[unit]
                    least[unit] = max(least[unit], self.least(*self.carried(form, depth, low, up)))
                    most[unit] = min(most[unit], -self.least(*self.carried(-form, depth, low, up)))
            low.append(least), up.append(most)
            most = np.maximum(least, most)
            below, above = (np.where(end > 0, end, self.kink * end) for end in (least, most))
        return np.concatenate(low), np.concatenate(up)

    def relaxed(self, row, offset: float, low, up, slopes, betas, signs) -> float:
        depth = len(self.affine) - 1
        form, constant = self.carried(
            row, depth, self.apart(low), self.apart(up), self.apart(slopes), self.apart(-signs * betas)
        )
        return self.least(form, constant) + offset

    def lagrangian(self, rows, offsets, low, up, weights, constraints, signs) -> float:
        """Every row and every constraint carried back by itself."""
        low, up = self.apart(low), self.apart(up)
        forms, constant = 0.0, 0.0
        for row, offset, weight in zip(rows, offsets, weights, strict=True):
            form, more = self.carried(row, len(self.affine) - 1, low, up)
            forms, constant = forms + weight * form, constant + weight * (more + offset)
        places = [(depth, unit) for depth, size in enumerate(self.sizes) for unit in range(size)]
        assumed = np.flatnonzero(signs)
        for place, weight in zip(assumed, constraints, strict=True):
            depth, unit = places[place]
            form, more = self.carried(-signs[place] * np.eye(self.sizes[depth])[unit], depth, low, up)
            forms, constant = forms + weight * form, constant + weight * more
        return self.least(forms, constant)


class Again:
    """The leaves of one image's tree, computed again in numpy."""

    def __init__(self, problem: Problem, number: int, tighten: bool):
        hull = problem.region.hull
        lower, upper = (end[number].flatten().numpy() for end in (hull.lower, hull.upper))
        self.plain, self.tighten = Plain(problem.network, lower, upper), tighten
        specification = problem.specification
        self.rows, self.offsets = (
            specification.rows[number].double().numpy(),
            specification.offsets[number].double().numpy(),
        )
        self.clauses = specification.clauses.numpy()
        self.root = self.plain.bounds(None)

    def subproblem(self, path: list[RecordedSubproblem]):
        """(signs, lower, upper) of all neurons, from the decisions alone."""
        lower, upper = (end.copy() for end in self.root)
        signs = np.zeros(len(lower))
        for one in path:
            if isinstance(one.decision, Sign):
                place, sign = one.decision.neuron, one.decision.sign
                signs[place] = sign
                (lower if sign > 0 else upper)[place] = 0.0
                if self.tighten:
                    lower, upper = self.plain.bounds((lower, np.maximum(lower, upper)))
        return signs, lower, upper

    def bound(self, path: list[RecordedSubproblem], draw: np.random.Generator | None = None) -> float:
        """Of the last on the path; with other slopes and multipliers than the recorded ones where ``draw`` is given."""
        one, (signs, lower, upper) = path[-1], self.subproblem(path)
        proof = one.proof
        if isinstance(proof, CrossedBounds):
            return math.inf if lower[proof.neuron] > upper[proof.neuron] else -math.inf
        assert isinstance(proof, Relaxed | Multipliers)
        neurons = proof.neurons.numpy()
        assert (proof.lower.numpy() <= lower[neurons] + FINE).all()
        assert (proof.upper.numpy() >= upper[neurons] - FINE).all()
        upper = np.maximum(lower, upper)
        if isinstance(proof, Relaxed):
            slopes, betas = np.zeros(len(lower)), np.zeros(len(lower))
            slopes[neurons], betas[neurons] = proof.slopes.numpy(), proof.multipliers.numpy()
            if draw is not None:
                slopes, betas = draw.random(len(slopes)), draw.exponential(size=len(slopes))
            assert (betas >= 0).all() and self.clauses[proof.row] == one.goal
            return self.plain.relaxed(
                self.rows[proof.row], self.offsets[proof.row], lower, upper, slopes, betas, signs
            )  # fmt: skip
        members, weights, constraints = self.clauses == one.goal, proof.rows.numpy(), proof.constraints.numpy()
        infeasible = isinstance(proof, Unsatisfiable)
        assert (weights >= 0).all() and weights.sum() == pytest.approx(0.0 if infeasible else 1.0)
        if draw is not None:
            constraints = draw.exponential(size=len(constraints))
        value = self.plain.lagrangian(
            self.rows[members], self.offsets[members], lower, upper, weights, np.maximum(constraints, 0), signs
        )  # fmt: skip
        return (math.inf if value > 0 else -math.inf) if infeasible else value


def nearly(bound: float) -> float:
    """Less the rounding of another order of evaluation."""
    return bound if math.isinf(bound) else bound - FINE * (1 + abs(bound))


def assert_proved(again: Again, record: SearchRecord, image: int) -> set[str]:
    """That all leaves of a proved image are, with the reasons."""
    reasons = set()
    for one in record.leaves(image):
        assert one.bound is not None and one.bound > 0 and one.proof is not None and one.reason == one.proof.reason
        value = again.bound(record.path(one))
        assert value > 0 and value >= nearly(one.bound), (one, value)
        reasons.add(one.reason)
    return reasons


class TestNeurons:
    @pytest.mark.parametrize("name", SEARCHES)
    @pytest.mark.parametrize("kind", ["dense", "leaky"])
    def test_every_leaf_again_by_weak_duality(self, kind, name):
        search, reasons, splits = SEARCHES[name], set(), 0
        for seed in range(6):
            problem, record = tight_problem(seed, kind), SearchRecord()
            found, _ = searched(problem, search, record)
            assert found.proved.tolist() == [True, True, False]
            for number in found.proved.nonzero().flatten().tolist():
                assert_covered_by_signs(record, number, int(problem.specification.clauses.max()) + 1)
                reasons |= assert_proved(Again(problem, number, search.tighten), record, number)
                splits += sum(bool(one.children) for one in record.subproblems if one.image == number)
                least = min(one.bound for one in record.leaves(number))
                assert float(found.lower[number]) == least
        assert splits >= 10 and "bounded" in reasons
        if name == "leaves by programs":
            assert {"leaf", "infeasible"} <= reasons

    def test_planted_networks(self):
        for seed in range(6):
            problem, record = planted_twin(5000 + seed, "dense"), SearchRecord()
            found, _ = searched(problem, Search(), record)
            assert found.proved.all()
            assert_covered_by_signs(record, 0, problem.specification.rows.shape[1])
            assert_proved(Again(problem, 0, True), record, 0)

    def test_no_slopes_and_multipliers_prove_what_is_false(self):
        """Whatever is in the file: no bound is above what the network takes in the subproblem."""
        draw, met = np.random.default_rng(0), 0
        for seed in range(8):
            problem, record = tight_problem(seed, "dense"), SearchRecord()
            found, _ = searched(problem, Search(steps=2), record)
            for number in found.proved.nonzero().flatten().tolist():
                again, one = Again(problem, number, True), problem.subset(torch.tensor([number]))
                share = torch.from_numpy(draw.random((3000, *one.region.images.shape[1:])))
                points = one.region.hull.lower + share * 2 * one.region.hull.radius
                network = fold(problem.network, points.shape[1:], dtype=torch.float64)
                values = network.values(points)
                entered = torch.cat([values[network.operations[p].inputs[0]].flatten(1) for p in network.nonlinear], 1)
                margins = network(points) @ one.specification.rows[0].double().T + one.specification.offsets[0]
                for leaf in record.leaves(number):
                    signs, *_ = again.subproblem(record.path(leaf))
                    inside = ((entered * torch.from_numpy(signs)) >= 0).all(1)
                    if inside.any() and isinstance(leaf.proof, Relaxed):
                        least = float(margins[inside, leaf.proof.row].min())
                        met += 1
                        assert all(again.bound(record.path(leaf), draw) <= least + FINE for _ in range(10))
        assert met >= 10

    @pytest.mark.parametrize("kind", ["conv", "residual", "max_pool", "leaky"])
    def test_other_networks_again_by_crown(self, kind):
        """Sums and convolutions: the same decisions, slopes and multipliers through our own linear bounds."""
        proved = 0
        for seed in range(4):
            problem = planted_twin(6000 + seed, kind) if seed < 2 else random_problem(seed, kind, 2, 0.1)
            record = SearchRecord()
            found, known = searched(problem, Search(), record)
            for number in found.proved.nonzero().flatten().tolist():
                assert_covered_by_signs(record, number, problem.specification.rows.shape[1])
                for leaf in record.leaves(number):
                    value = by_crown(problem, known, number, record.path(leaf))
                    assert value > 0 and value >= nearly(leaf.bound)
                proved += 1
        assert proved >= 2

    def test_a_record_changes_nothing(self):
        for seed in range(4):
            problem, record = tight_problem(seed, "dense"), SearchRecord()
            search = Search(root_steps=0)  # for which a record has no place
            (plain, _), (kept, _) = searched(problem, search, None), searched(problem, search, record)
            assert torch.equal(plain.lower, kept.lower) and plain.reasons == kept.reasons
            assert torch.equal(plain.proved, kept.proved)

    def test_every_subproblem_is_closed_once_whatever_ends_the_search(self):
        reasons = set()
        for search, timeout in ((Search(), 60.0), (Search(most=2), 60.0), (Search(batch=1), 1e-9)):
            for seed in range(5):
                problem, record = tight_problem(seed, "dense"), SearchRecord()
                found, _ = searched(problem, search, record, timeout=timeout)
                for one in record.subproblems:
                    assert (one.reason is None) == bool(one.children)
                    assert (one.proof is not None) == (one.bound is not None and one.bound > 0)
                    if one.reason == "counterexample":
                        assert found.counterexamples[one.image] is not None
                    if one.reason == "given up":
                        assert not found.proved[one.image]
                    reasons.add(one.reason)
                for image in range(len(problem)):
                    if found.counterexamples[image] is not None or found.reasons[image] is not None:
                        assert not found.proved[image]
                        exact = least_margin(problem, image)
                        assert float(found.lower[image]) <= exact + 1e-5
        assert {"bounded", "counterexample", "given up"} <= reasons


def least_margin(problem: Problem, number: int) -> float:
    network = fold(problem.network, problem.region.images.shape[1:], dtype=torch.float64)
    one = problem.subset(torch.tensor([number]))
    region, specification = one.region, one.specification
    exact = minimum(network, region, specification.rows.double(), specification.offsets.double(),
                    crown_bounds(network, region), clauses=specification.clauses)  # fmt: skip
    return float(exact.values.min())


def by_crown(problem: Problem, known: BoundsSoFar, number: int, path: list[RecordedSubproblem]) -> float:
    network, neurons, at = known.network, Neurons.of(known.network), torch.tensor([number])
    region, bounds = problem.region.take(at), known.subset(at).bounds
    lower, upper = neurons.ends(bounds, known.rows[at])
    signs = torch.zeros_like(lower, dtype=torch.int8)
    for one in path:
        if isinstance(one.decision, Sign):
            place, sign = one.decision.neuron, one.decision.sign
            signs[0, place] = sign
            (lower if sign > 0 else upper)[0, place] = 0.0
            lows, ups = neurons.apart(lower), neurons.apart(torch.maximum(lower, upper))
            bounds = crown_bounds(network, region, {k: Bounds(lows[k], ups[k]) for k in lows})
            lower, upper = neurons.ends(bounds, known.rows[at])
    proof = path[-1].proof
    if isinstance(proof, CrossedBounds):
        return math.inf if lower[0, proof.neuron] > upper[0, proof.neuron] else -math.inf
    rows, offsets = known.rows_of(problem.specification)
    upper = torch.maximum(lower, upper)
    if isinstance(proof, Relaxed):
        slopes, betas = torch.zeros_like(lower), torch.zeros_like(lower)
        slopes[0, proof.neurons], betas[0, proof.neurons] = proof.slopes, proof.multipliers
        sub = Subproblems(region, rows[at, proof.row][:, None], offsets[at, proof.row][:, None], lower, upper, signs)
        return float(maximise(network, sub, slopes[:, None], betas[:, None], steps=0).best)
    assert isinstance(proof, Multipliers)
    members = problem.specification.clauses == path[-1].goal
    program = leaf_program(
        network, region, rows[number, members], offsets[number, members], lower[0], upper[0], signs[0]
    )
    value = program.lagrangian(torch.cat([proof.rows, proof.constraints]))
    return (math.inf if value > 0 else -math.inf) if isinstance(proof, Unsatisfiable) else value


def boxes_problem(seed: int) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    model = random_network("dense", torch.Size((1, 1, 2)), 3, draw, 1.0).eval().double()
    lower = torch.rand(3, 1, 1, 2, generator=draw, dtype=torch.float64)
    rows, clauses = torch.randn(3, 3, 3, generator=draw), torch.tensor([0, 1, 0])
    region = Box(lower, lower + 3.0)
    problem = Problem(model, region, Specification(rows, torch.zeros(3, 3), clauses), torch.arange(3))
    least = torch.stack([problem.specification.worst(problem.specification.values(model(points)))
                         for points in region.lower + 3 * torch.rand(500, 1, 1, 1, 2, generator=draw)])  # fmt: skip
    offsets = (0.05 - least.amin(0)).unsqueeze(1).expand(3, 3).contiguous()
    return replace(problem, specification=Specification(rows, offsets, clauses))


class TestBoxes:
    def test_boxes_cover_and_are_bounded_again(self):
        splits = clipped = 0
        for seed in range(6):
            problem, record, judge = boxes_problem(seed), SearchRecord(), Judge()
            known = unknown(problem)
            found = split_inputs(
                problem, known, 60.0, lambda n, point, p=problem, j=judge: j(p, n, point), record=record
            )
            rows, offsets = known.rows_of(problem.specification)
            members, _ = rows_of_clauses(problem.specification.clauses)
            bounds = BoxBounds(known.network, rows, offsets, members, {}, known.region_of(problem))
            for number in found.proved.nonzero().flatten().tolist():
                assert len(record.roots(number)) == 1
                for one in record.subproblems:
                    if one.image == number and one.children:
                        clipped += assert_halves(problem, record, one, bounds)
                        splits += 1
                for leaf in record.leaves(number):
                    lower, upper = box_of(problem, record.path(leaf))
                    again = bounds(Box(lower, upper), torch.tensor([number]))
                    if isinstance(leaf.proof, Clipped):
                        assert leaf.reason == "infeasible" and leaf.bound > 0
                        assert nothing_left(leaf.proof.clip, again, lower[0].flatten(), upper[0].flatten())
                        continue
                    assert isinstance(leaf.proof, Concretised) and leaf.reason == "bounded"
                    assert float(again.clauses.amin()) >= leaf.bound - FINE and leaf.bound > 0
                    assert torch.allclose(again.weights[0], leaf.proof.rows)
                    assert torch.allclose(leaf.proof.rows.sum(1), torch.ones(2, dtype=torch.float64))
        assert splits >= 10 and clipped >= 5


def double(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def box_of(problem: Problem, path: list[RecordedSubproblem]) -> tuple[torch.Tensor, torch.Tensor]:
    lower, upper = (end[path[0].image].clone() for end in (problem.region.hull.lower, problem.region.hull.upper))
    for one in path[1:]:
        clip = one.decision.clip
        assert (double(clip.lower) >= lower.flatten()).all() and (double(clip.upper) <= upper.flatten()).all()
        for end, ends, value in (
            (lower, clip.lower, one.decision.lower), (upper, clip.upper, one.decision.upper)
        ):  # fmt: skip
            end.view(-1)[:] = double(ends)
            end.view(-1)[one.decision.input] = value
    return lower[None], upper[None]


def assert_halves(problem: Problem, record: SearchRecord, one: RecordedSubproblem, bounds: BoxBounds) -> bool:
    """The children are the halves of a clipped box, outside of which the lines, computed again, are positive; whether
    the box is smaller than before."""
    first, second = (record.subproblems[number].decision for number in one.children)
    clip = first.clip
    assert first.input == second.input and first.upper == second.lower and second.clip is clip
    assert first.lower == clip.lower[first.input] and second.upper == clip.upper[second.input]
    whole = box_of(problem, record.path(one))
    again = bounds(Box(*whole), torch.tensor([one.image]))
    lower, upper = (end[0].flatten() for end in whole)
    assert_lines(clip, again)
    for clause in clip.clauses:
        ends = ends_by_lines(clip, clause, lower, upper)
        if (ends[0] <= ends[1]).all():
            assert (double(clip.lower) <= ends[0]).all() and (double(clip.upper) >= ends[1]).all()
    return clip.lower != tuple(lower.tolist()) or clip.upper != tuple(upper.tolist())


def assert_lines(clip: Clip, again: ClauseBounds) -> None:
    assert torch.allclose(clip.forms, again.cuts.forms[0].flatten(2), atol=FINE)
    assert torch.allclose(clip.least, again.cuts.least[0], atol=FINE)
    proved = [clause for clause, bound in enumerate(again.clauses[0].tolist()) if bound > 0]
    assert sorted([*proved, *clip.clauses]) == list(range(len(again.clauses[0])))


def ends_by_lines(
    clip: Clip, clause: int, lower: torch.Tensor, upper: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where all lines of a clause may be <= 0, input by input."""
    forms, reach = clip.forms[clause], -clip.least[clause].unsqueeze(1) / clip.forms[clause].abs()
    above = torch.where(forms > 0, lower + reach, torch.inf).amin(0)
    below = torch.where(forms < 0, upper - reach, -torch.inf).amax(0)
    return torch.maximum(lower, below), torch.minimum(upper, above)


def nothing_left(clip: Clip, again: ClauseBounds, lower: torch.Tensor, upper: torch.Tensor) -> bool:
    assert_lines(clip, again)
    ends = (ends_by_lines(clip, clause, lower, upper) for clause in clip.clauses)
    return all(bool((below > above).any()) for below, above in ends)


class TestUnits:
    @pytest.mark.parametrize("k", [1, 2])
    def test_choices_of_units_are_covered(self, k):
        splits, kinds = 0, set()
        for seed in range(6):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)).eval().double()
            images = torch.rand(6, 1, 3, 3, dtype=torch.float64)
            problem = problem_of(model, images, model(images).argmax(1), SparseBall(k), 3)
            record, judge, known = SearchRecord(), Judge(), unknown(problem)
            found = split_locations(
                problem, known, Search(), 60.0, lambda n, point, p=problem, j=judge: j(p, n, point), record=record
            )
            for number in found.proved.nonzero().flatten().tolist():
                choices = [c for size in range(k + 1) for c in itertools.combinations(range(9), size)]
                for one in record.subproblems:
                    if one.image == number and one.children:
                        splits += 1
                        mine = [c for c in choices if allowed(one, c)]
                        children = [record.subproblems[child] for child in one.children]
                        assert all(any(allowed(child, choice) for child in children) for choice in mine)
                for leaf in record.leaves(number):
                    kinds.add(leaf.reason)
                    assert leaf.bound > 0
                    if isinstance(leaf.proof, Searched):
                        inner = leaf.proof.record.leaves(leaf.proof.image)
                        assert inner and all(i.bound > 0 and i.proof is not None for i in inner)
                    else:
                        assert isinstance(leaf.proof, Concretised) and (leaf.proof.rows.sum(1) == 1).all()
                        assert bound_of_units(problem, known, leaf) >= leaf.bound - FINE
        assert splits and ("bounded" in kinds)


def allowed(one: RecordedSubproblem, changed: tuple[int, ...]) -> bool:
    if one.decision is None:
        return True
    free, possible = set(one.decision.free), set(one.decision.possible)
    return set(changed) <= free | possible and len(set(changed) & possible) <= one.decision.budget


def bound_of_units(problem: Problem, known: BoundsSoFar, leaf: RecordedSubproblem) -> float:
    free, possible = torch.zeros(1, 9, dtype=torch.bool), torch.ones(1, 9, dtype=torch.bool)
    budget = torch.tensor([int(problem.region.ball.k)])
    if leaf.decision is not None:
        possible = ~free
        possible[:] = False
        free[0, list(leaf.decision.free)], possible[0, list(leaf.decision.possible)] = True, True
        budget = torch.tensor([leaf.decision.budget])
    images = problem.region.images[leaf.image : leaf.image + 1]
    region = SparsePart.of(problem.region.ball, images, free, possible, budget)
    network, rows = known.network, problem.specification.rows[leaf.image : leaf.image + 1].double()
    linear = backward(network, len(network.operations) - 1, rows, relax_all(network, crown_bounds(network, region)))
    return float(problem.specification.worst(linear.lower(region)))
