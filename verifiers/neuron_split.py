"""Branch and bound on the signs of ReLU inputs, with beta-CROWN's bounds (arXiv 2103.06624) and subproblems of many
images in one batch.

A subproblem is one clause of one image's specification under assumed signs; it is split at one neuron. A leaf, where
every sign is known, is solved by a linear program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bounds import Bounds, memory
from ..bounds.crown import crown_bounds
from ..bounds.network import Network
from ..typed import as_bools, as_ints
from .bounds_so_far import BoundsSoFar
from .branching import minimiser, scores
from .engine import (
    Bounded,
    Bounder,
    BranchAndBound,
    ImageProgress,
    LeafSolver,
    OpenSubproblems,
    SearchOutcome,
    SolverResult,
    Splitter,
    Violates,
)
from .lp import LeafSolution, rounded_bound, solve_leaf
from .optimise import BestParameters, Neurons, Optimised, Subproblems, ascents_at_a_time, maximise, starting_slopes
from .problem import Problem, rows_of_clauses
from .search import Search
from .search_record import CrossedBounds, Multipliers, Proof, Relaxed, SearchRecord, Sign, Unsatisfiable

TOLERANCE = 1e-6
"""Relative to the logits' largest absolute value: a leaf whose exact minimum is closer to 0 is left undecided."""

EMPTY = 1e-5
"""Relative to 1 + |bound|: where a neuron's bounds cross by more, the assumed signs are infeasible; less may be
rounding."""

PROGRAM_EVERY = 8
"""Number of splits after which a subproblem goes to a linear program, whose multipliers are optimal: it finds many
infeasible subproblems (18 open neurons over 3 inputs: 2 s, not minutes). With 6, hidden counterexamples of networks of
30 neurons took four times as long."""

PROBING = 0.25
"""Share of the time spent in linear programs of open subproblems. Without them networks of 30 neurons with a
counterexample that gradients do not find take minutes."""


def split_neurons(
    problem: Problem,
    known: BoundsSoFar,
    exact: Network,
    search: Search,
    timeout: float,
    violates: Violates,
    record: SearchRecord | None = None,
) -> SearchOutcome:
    """Prove or refute the clauses without a positive bound in ``known``.

    Args:
        exact: the network in float64, for the leaves' linear programs.
        timeout, violates, record: as in ``BranchAndBound``.
    """
    space = SignSpace(problem, known)
    bounder = SignBounder(space, search, recording=record is not None)
    return BranchAndBound(
        problem, known.network, space.worst, space.roots(), bounder, SignSplitter(space, search),
        LinearProgramSolver(space, exact), timeout=timeout, violates=violates, most=search.most, record=record,
    ).run()  # fmt: skip


@dataclass(frozen=True)
class SignSubproblems(OpenSubproblems):
    """Subproblems that store only the neurons which are unstable under their image's bounds, in U columns.

    Args:
        branch: (P,) int64, the column to split at next.
        signs: (P, U) int8, the assumed signs: 1, -1, or 0 for none.
        lower, upper: (P, U) bounds of the neurons' inputs.
        alphas, betas: (P, R, U) slopes and multipliers.
    """

    branch: Tensor
    signs: Tensor
    lower: Tensor
    upper: Tensor
    alphas: Tensor
    betas: Tensor


@dataclass(frozen=True)
class PackedSigns(OpenSubproblems):
    """Subproblems by their assumed signs alone.

    Args:
        branch: as in ``SignSubproblems``.
        decided: (P, D) int32, the columns with an assumed sign, counted from 1 and multiplied by the sign; 0 for none.
    """

    branch: Tensor
    decided: Tensor


class SignSpace:
    """Data shared by all subproblems of a batch of problems: columns of unstable neurons, and rows of clauses."""

    def __init__(self, problem: Problem, known: BoundsSoFar):
        self.problem, self.network = problem, known.network
        self.region = known.region_of(problem)
        self.rows, self.offsets = known.rows_of(problem.specification)
        self.neurons = Neurons.of(known.network)
        self.lower, self.upper = self.neurons.ends(known.bounds, known.rows)  # (B, N)
        self.columns = columns_of((self.lower < 0) & (self.upper > 0))
        self.clauses, _ = rows_of_clauses(problem.specification.clauses)
        self.worst = known.rows[:, self.clauses].amax(-1)  # (B, clauses)
        self.slopes = known.alphas  # (B, R, N) to start from; CROWN's if None

    def roots(self) -> PackedSigns:
        """The open clauses without assumed signs."""
        image, clause = (~(self.worst > 0)).nonzero(as_tuple=True)
        none = torch.zeros_like(image)
        decided = torch.zeros(len(image), 0, dtype=torch.int32, device=image.device)
        return PackedSigns(image, clause, self.worst[image, clause], none - 1, none, decided)

    def packed(self, some: SignSubproblems) -> PackedSigns:
        """The subproblems without bounds, slopes and multipliers of their own."""
        assumed = some.signs != 0
        most = int(assumed.sum(1).max()) if len(some) else 0
        columns = torch.argsort(assumed.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
        decided = (some.signs.gather(1, columns) * (columns + 1)).to(torch.int32)
        return PackedSigns(some.image, some.goal, some.bound, some.node, some.branch, decided)

    def restored(self, packed: PackedSigns) -> SignSubproblems:
        """The subproblems with their image's bounds, the slopes to start from, and no multipliers."""
        image, rows = packed.image, self.clauses[packed.goal]
        lower, upper = (self.gathered(end[image].unsqueeze(1), image)[:, 0] for end in (self.lower, self.upper))
        if self.slopes is None:
            alphas = starting_slopes(lower, upper, rows.shape[1])
        else:
            alphas = self.gathered(self.slopes[image[:, None], rows], image)
        signs = torch.zeros(len(image), self.columns.shape[1] + 1, dtype=torch.int8, device=image.device)
        signs.scatter_(1, packed.decided.abs().long(), packed.decided.sign().to(torch.int8))
        return SignSubproblems(
            image, packed.goal, packed.bound, packed.node, packed.branch, signs[:, 1:], lower, upper, alphas,
            torch.zeros_like(alphas),
        )  # fmt: skip

    def dense(self, some: SignSubproblems) -> tuple[Tensor, Tensor, Tensor]:
        """(signs, lower, upper) in all neurons, each (D, N)."""
        signs = self.spread(some.signs.unsqueeze(1), some, 0)[:, 0]
        lower, upper = (
            scattered(whole[some.image], self.columns[some.image], part)
            for whole, part in ((self.lower, some.lower), (self.upper, some.upper))
        )
        return signs, lower, upper

    def linear(self, some: SignSubproblems) -> Subproblems:
        """The subproblems in all neurons, as ``maximise`` takes them."""
        signs, lower, upper = self.dense(some)
        at = (some.image[:, None], self.clauses[some.goal])
        return Subproblems(self.region.take(some.image), self.rows[at], self.offsets[at], lower, upper, signs)

    def parameters(self, some: SignSubproblems) -> tuple[Tensor, Tensor]:
        """(alphas, betas) in all neurons, each (D, R, N)."""
        return self.spread(some.alphas, some, 0.5), self.spread(some.betas, some, 0.0)

    def spread(self, values: Tensor, some: SignSubproblems, fill: float) -> Tensor:
        """Spread columns (D, R, U) over all neurons (D, R, N), with ``fill`` elsewhere."""
        out = values.new_full((*values.shape[:2], self.lower.shape[1]), fill)
        return scattered(out, self.columns[some.image].unsqueeze(1).expand_as(values), values)

    def gathered(self, values: Tensor, image: Tensor) -> Tensor:
        """Gather the columns (D, R, U) from all neurons (D, R, N)."""
        columns = self.columns[image].unsqueeze(1).expand(-1, values.shape[1], -1)
        return torch.cat([values, values[..., :1]], -1).gather(2, columns)


@dataclass(frozen=True, eq=False)
class SignBounds(Bounded[SignSubproblems]):
    """Linear bounds of D subproblems.

    Args:
        linear: the subproblems in all neurons.
        ends: (D, U) each, lower and upper bounds of the neurons' inputs as computed, which may cross.
        empty: (D,) bool, where they cross, so that nothing satisfies the signs.
        row: (D,) the row of the clause with the highest bound; point: (D, *shape), where that bound is smallest.
        best: the parameters of the best bounds, for a search that is recorded.
    """

    space: SignSpace
    linear: Subproblems
    ends: tuple[Tensor, Tensor]
    empty: Tensor
    optimised: Optimised
    row: Tensor
    point: Tensor
    best: BestParameters | None

    def points(self, index: Tensor) -> tuple[Tensor, ...]:
        return (self.space.problem.region.take(self.subproblems.image[index]).nearest(self.point[index]),)

    def proof(self, number: int) -> Proof:
        neurons = self.neurons(number)
        if bool(self.empty[number]):
            lower, upper = (end[number, : len(neurons)] for end in self.ends)
            worst = int(((lower - upper) / (1 + lower.abs())).argmax())
            return CrossedBounds(int(neurons[worst]), float(lower[worst]), float(upper[worst]))
        assert self.best is not None and self.best.alphas is not None and self.best.betas is not None
        row = int(self.row[number])
        member = int(self.space.clauses[int(self.subproblems.goal[number]), row])
        slopes, multipliers = (part[number, row, neurons] for part in (self.best.alphas, self.best.betas))
        return Relaxed(member, neurons, *self.inputs(number), slopes, multipliers)

    def neurons(self, number: int) -> Tensor:
        """The places of the neurons in the columns of one subproblem."""
        columns = self.space.columns[int(self.subproblems.image[number])]
        return columns[columns < self.linear.lower.shape[1]]

    def inputs(self, number: int) -> tuple[Tensor, Tensor]:
        """(lower, upper) bounds of the inputs of one subproblem's ``neurons``."""
        neurons = self.neurons(number)
        return self.linear.lower[number, neurons], self.linear.upper[number, neurons]


class SignBounder(Bounder[SignSubproblems, SignBounds]):
    def __init__(self, space: SignSpace, search: Search, recording: bool):
        self.space, self.search, self.recording = space, search, recording

    @property
    def at_a_time(self) -> int:
        rows = self.space.clauses.shape[1]
        return max(1, min(2 * self.search.batch, ascents_at_a_time(self.space.network, rows, self.space.lower)))

    def packed(self, subproblems: SignSubproblems) -> PackedSigns:
        return self.space.packed(subproblems)

    def restored(self, packed: PackedSigns) -> SignSubproblems:
        return self.space.restored(packed)

    def bound(self, subproblems: SignSubproblems) -> SignBounds:
        some, ends, empty = self._tightened(subproblems)
        linear = self.space.linear(some)
        best = BestParameters() if self.recording else None
        optimised = maximise(
            self.space.network, linear, *self.space.parameters(some), steps=self.search.steps, rate=self.search.rate,
            done=lambda best: (best.amax(1) > 0) | empty, kept=best,
        )  # fmt: skip
        assert optimised.betas is not None
        bound = torch.where(empty, torch.inf, torch.maximum(some.bound, optimised.best.amax(1)))
        alphas, betas = (self.space.gathered(values, some.image) for values in (optimised.alphas, optimised.betas))
        row = optimised.best.argmax(1)
        some = replace(some, bound=bound, alphas=alphas, betas=betas)
        return SignBounds(
            some, self.space, linear, ends, empty, optimised, row, minimiser(optimised, linear.region, row), best
        )  # fmt: skip

    def _tightened(self, some: SignSubproblems) -> tuple[SignSubproblems, tuple[Tensor, Tensor], Tensor]:
        """(subproblems, ends, empty): the subproblems with their neurons' bounds recomputed under their signs; these
        bounds as computed, which may cross; (D,) bool, where they do."""
        space, some = self.space, _clamped(some)
        lower, upper = some.lower, some.upper
        if self.search.tighten and bool((some.signs != 0).any()):
            _, low, up = space.dense(some)
            lowers, uppers = space.neurons.apart(low), space.neurons.apart(up)
            given = {place: Bounds(lowers[place], uppers[place]) for place in lowers}
            tighter = crown_bounds(space.network, space.region.take(some.image), given)
            low = space.neurons.together({place: bounds.lower for place, bounds in tighter.items()})
            up = space.neurons.together({place: bounds.upper for place, bounds in tighter.items()})
            lower, upper = (space.gathered(end.unsqueeze(1), some.image)[:, 0] for end in (low, up))
        real = space.columns[some.image] < space.lower.shape[1]
        empty = (real & (lower - upper > EMPTY * (1 + lower.abs()))).any(1)
        return replace(some, lower=lower, upper=torch.maximum(lower, upper)), (lower, upper), empty


class SignSplitter(Splitter[SignSubproblems, SignBounds]):
    def __init__(self, space: SignSpace, search: Search):
        self.space, self.search = space, search

    @property
    def at_a_time(self) -> int:
        """As many as the settings say, if these and their children are a small part of the open ones."""
        numbers = self.space.columns.shape[1] * (2 + 2 * self.space.clauses.shape[1])
        most = memory.kept(self.space.lower) // (8 * numbers * self.space.lower.element_size())
        return max(1, min(self.search.batch, most))

    def options(self, bounded: SignBounds) -> Tensor:
        linear = bounded.linear
        cost = scores(self.space.network, bounded.optimised, linear.lower, linear.upper, bounded.row, bounded.point)
        cost = torch.cat([cost, torch.full_like(cost[:, :1], -torch.inf)], 1)
        return cost.gather(1, self.space.columns[bounded.subproblems.image])

    def decide(self, bounded: SignBounds, options: Tensor, index: Tensor) -> SignSubproblems:
        """Choose, among the ``search.candidates`` best scores, the neuron with the largest product of its halves' gains
        at the current parameters (after filtered smart branching, arXiv 2002.10410). The worse half's bound by itself
        is nearly the parent's for all of them, and chose neurons at random."""
        some, cost = bounded.subproblems.take(index), options[index]
        count = min(self.search.candidates, cost.shape[1])
        best, columns = cost.topk(count, dim=1)
        if count == 1:
            return replace(some, branch=columns[:, 0])
        gains: list[Tensor] = []
        for place in range(count):
            halves = [self._bounds_of(half) for half in self._halves(replace(some, branch=columns[:, place]))]
            first, second = (
                (half.clamp(max=0) - some.bound).clamp(min=0) for half in halves
            )  # a bound above 0 gains no more than 0
            floor = 1e-3 * some.bound.abs()
            gains.append(torch.where(best[:, place] > -torch.inf, (first + floor) * (second + floor), -torch.inf))
        chosen = torch.stack(gains, 1).argmax(1, keepdim=True)
        return replace(some, branch=columns.gather(1, chosen)[:, 0])

    def children(self, parents: SignSubproblems) -> SignSubproblems:
        first, second = self._halves(parents)
        return first.joined(second)

    def decisions(self, children: SignSubproblems) -> Sequence[Sign]:
        at = children.branch.unsqueeze(1)
        neurons = as_ints(self.space.columns[children.image].gather(1, at))
        return [Sign(neuron, sign) for neuron, sign in zip(neurons, as_ints(children.signs.gather(1, at)))]

    def _halves(self, parents: SignSubproblems) -> list[SignSubproblems]:
        at = parents.branch.unsqueeze(1)
        return [replace(parents, signs=parents.signs.scatter(1, at, sign)) for sign in (1, -1)]

    def _bounds_of(self, some: SignSubproblems) -> Tensor:
        """(D,) bounds at the subproblems' own slopes and multipliers, without optimisation."""
        some, space = _clamped(some), self.space
        return maximise(space.network, space.linear(some), *space.parameters(some), steps=0).best.amax(1)


class LinearProgramSolver(LeafSolver[SignSubproblems, SignBounds]):
    """Solves the linear program of a subproblem; it is exact in a leaf, where the network is affine."""

    ends_search = False
    probing = PROBING

    def __init__(self, space: SignSpace, exact: Network):
        self.space, self.exact = space, exact

    def wants(self, bounded: SignBounds) -> Tensor:
        depth = (bounded.subproblems.signs != 0).sum(1)
        return (depth % PROGRAM_EVERY == 0) & (depth > 0)

    def solve(self, bounded: SignBounds, index: Tensor, leaf: Tensor, progress: ImageProgress) -> SolverResult:
        bounds, undecided, proofs = list[float](), list[str | None](), list[Proof | None]()
        images = as_ints(bounded.subproblems.image[index])
        for image, number, last in zip(images, as_ints(index), as_bools(leaf), strict=True):
            bound, why, proof = -math.inf, None, None
            if progress.is_unfinished(image):
                solution = self._program(bounded.subproblems, bounded.linear, number)
                if solution.point is not None:
                    progress.refute(image, self._point(image, solution.point))
                bound = self._bound_of(bounded, number, solution)
                if bound > 0:
                    proof = self._proof(bounded, number, solution)
                elif last and progress.is_unfinished(image):
                    why = self._doubt(image, bound)
            bounds.append(bound)
            undecided.append(why)
            proofs.append(proof)
        return SolverResult(torch.tensor(bounds, dtype=torch.float64, device=index.device), undecided, proofs)

    def probe(self, one: SignSubproblems) -> Tensor | None:
        """The linear program's minimiser, which satisfies the assumed signs."""
        point = self._program(one, self.space.linear(one), 0).point
        return None if point is None else self._point(int(one.image), point)

    def _program(self, some: SignSubproblems, linear: Subproblems, number: int) -> LeafSolution:
        space, image, at = self.space, int(some.image[number]), self._members(some, number)
        region = space.problem.region.take(some.image[number : number + 1]).to(torch.float64)
        assert linear.signs is not None
        return solve_leaf(
            self.exact, region, space.rows[image, at].double(), space.offsets[image, at].double(),
            linear.lower[number].double(), linear.upper[number].double(), linear.signs[number],
        )  # fmt: skip

    def _bound_of(self, bounded: SignBounds, number: int, solution: LeafSolution) -> float:
        """The solution's bound in the arithmetic of the search."""
        if self.space.network.rounding is None:
            return solution.bound
        space, linear, some = self.space, bounded.linear, bounded.subproblems
        image, at, one = int(some.image[number]), self._members(some, number), slice(number, number + 1)
        assert linear.signs is not None
        inside = Subproblems(
            space.region.take(some.image[one]), space.rows[image, at][None], space.offsets[image, at][None],
            linear.lower[one], linear.upper[one], linear.signs[one],
        )  # fmt: skip
        return rounded_bound(space.network, inside, solution)

    def _proof(self, bounded: SignBounds, number: int, solution: LeafSolution) -> Proof:
        assert solution.weights is not None
        count = int(self._members(bounded.subproblems, number).sum())
        kind = Unsatisfiable if solution.infeasible else Multipliers
        neurons = bounded.neurons(number)
        return kind(solution.weights[:count], solution.weights[count:], neurons, *bounded.inputs(number))

    def _members(self, some: SignSubproblems, number: int) -> Tensor:
        """(R,) bool, which of the specification's rows belong to a subproblem's clause."""
        return self.space.problem.specification.clauses == int(some.goal[number])

    def _point(self, image: int, point: Tensor) -> Tensor:
        number = torch.tensor([image], device=self.space.columns.device)
        return self.space.problem.region.take(number).nearest(point[None])[0]

    def _doubt(self, image: int, bound: float) -> str:
        scale = float(self.space.network(self.space.region.images[image : image + 1]).abs().max().clamp(min=1))
        return "within tolerance" if bound > -TOLERANCE * scale else "leaf"


def _clamped(some: SignSubproblems) -> SignSubproblems:
    """The subproblems with bounds clamped to the assumed signs."""
    lower = torch.where(some.signs > 0, some.lower.clamp(min=0), some.lower)
    upper = torch.where(some.signs < 0, some.upper.clamp(max=0), some.upper)
    return replace(some, lower=lower, upper=upper)


def columns_of(open_: Tensor) -> Tensor:
    """(B, U) places of each image's unstable neurons, given (B, N) bool; shorter rows are filled up with N."""
    most = max(1, int(open_.sum(1).max()) if open_.numel() else 1)
    order = torch.argsort(open_.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
    return torch.where(open_.gather(1, order), order, open_.shape[1])


def scattered(whole: Tensor, columns: Tensor, part: Tensor) -> Tensor:
    """A copy of ``whole`` (…, N) with ``part`` written at ``columns``; columns N are ignored."""
    padded = torch.cat([whole, whole[..., :1]], -1)
    return padded.scatter(-1, columns, part)[..., :-1]
