"""Branch and bound on the signs of ReLU inputs, with beta-CROWN's bounds (arXiv 2103.06624) and subproblems of many
images in one batch.

A subproblem is one clause of one image's specification under assumed signs; it is split at one neuron. A leaf, where
every sign is known, is solved by a linear program.

Other non-linear functions are relaxed over the bounds of their inputs, which are computed anew under the assumed signs
now and then, and in leaves. A leaf's linear program is then a relaxation: its positive bound proves the leaf, but a
leaf that it does not prove stays open and ends the search of its image, undecided.
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
from ..typed import as_bools, as_ints, unique
from .bounds_so_far import BoundsSoFar
from .branching import minimiser, scores
from .descent import points_at_a_time
from .engine import (
    Bounded,
    Bounder,
    BranchAndBound,
    LeafSolver,
    OpenSubproblems,
    SearchOutcome,
    SolverResult,
    Splitter,
)
from .image_progress import ImageProgress, Violates
from .lp import LeafSolution, rounded_bound, solve_leaf
from .neurons import Columns
from .optimise import BestParameters, Optimised, Subproblems, ascents_at_a_time, joined, maximise
from .problem import Problem
from .reduced import Reduced
from .search import Search
from .search_record import CrossedBounds, Multipliers, Proof, Relaxed, SearchRecord, Sign, Unsatisfiable
from .search_statistics import part
from .sign_space import PackedSigns, SignSpace, SignSubproblems, crossed
from .tighter_bounds import passes, tightening_work, work_of_a_row

TOLERANCE = 1e-6
"""Relative to the logits' largest absolute value: a leaf whose exact minimum is closer to 0 is left undecided."""

PROGRAM_EVERY = 8
"""Number of splits after which a subproblem goes to a linear program, whose multipliers are optimal: it finds many
infeasible subproblems (18 open neurons over 3 inputs: 2 s, not minutes). With 6, hidden counterexamples of networks of
30 neurons took four times as long."""

REBOUND_EVERY = 8
"""Number of splits after which the bounds of all neurons are recomputed under the signs, in networks with other
functions than ReLUs. That takes more than half of the time if it is done after each split: on a vision transformer of
the digits 120 subproblems were split without, 42 with, in the same 12 s."""

RELAXED = "all ReLUs are split, other functions stay relaxed"
"""Why a network with other functions than ReLUs stays undecided."""

TRIALS, PAYS = 32, 8
"""An image's subproblems go to ``TRIALS`` linear programs, and to more while one in ``PAYS`` closes a subproblem: each
costs as much as bounding dozens of them."""

PROBING = 1 / 64
"""Share of the subproblems whose linear program is solved before they are split, one a round at least. Without them
networks of 30 neurons with a counterexample that gradients do not find take minutes."""


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
        timeout, violates, record: as in ``BranchAndBound``. A recorded search does without ``search.root_steps``: the
            record has no place for their slopes, nor for parameters of functions that are not piecewise linear.
    """
    search = search if record is None else replace(search, root_steps=0)
    space = SignSpace(problem, known)
    bounder = SignBounder(space, search, recording=record is not None)
    return BranchAndBound(
        problem, known.network, space.worst, space.roots(), bounder, SignSplitter(space, search),
        LinearProgramSolver(space, exact, search.programs), timeout=timeout, violates=violates, most=search.most,
        record=record, descents=search.descents, bounds=known.bounds,
    ).run()  # fmt: skip


@dataclass(frozen=True, eq=False)
class SignBounds(Bounded[SignSubproblems]):
    """Linear bounds of D subproblems.

    Args:
        ends: (D, U) each, lower and upper bounds of the neurons' inputs as computed, which may cross.
        empty: (D,) bool, where they cross, so that nothing satisfies the signs.
        row: (D,) the row of the clause with the highest bound; point: (D, *shape), where that bound is smallest.
        best: the parameters of the best bounds, for a search that is recorded.
    """

    space: SignSpace
    ends: tuple[Tensor, Tensor]
    empty: Tensor
    optimised: Optimised
    row: Tensor
    point: Tensor
    best: BestParameters | None

    def outputs(self, network: Network, index: Tensor, points: Tensor) -> Tensor:
        """Those of the images' reduced networks, where they have one: of the same value, and cheaper."""
        images, found = self.subproblems.image[index], points.new_empty(len(points), network.shapes[-1].numel())
        whole = torch.ones_like(images, dtype=torch.bool)
        for image, small in self.space.reduced.items():
            own = (images == image).nonzero().flatten()
            if len(own):
                whole[own], found[own] = False, small.network(points[own].flatten(1))
        size = points_at_a_time(network, self.space.problem.specification, points)
        for own in torch.split(whole.nonzero().flatten(), size):
            found[own] = network(points[own])
        return found

    def points(self, index: Tensor) -> tuple[Tensor, ...]:
        return (self.space.problem.region.take(self.subproblems.image[index]).nearest(self.point[index]),)

    def proof(self, number: int) -> Proof:
        neurons, real = self.neurons(number), self._columns(number).real[0]
        if bool(self.empty[number]):
            lower, upper = (end[number, real] for end in self.ends)
            worst = int(((lower - upper) / (1 + lower.abs())).argmax())
            return CrossedBounds(int(neurons[worst]), float(lower[worst]), float(upper[worst]))
        assert self.best is not None and self.best.alphas is not None and self.best.betas is not None
        row = int(self.row[number])
        member = int(self.space.clauses[int(self.subproblems.goal[number]), row])
        slopes, multipliers = (part[number, row, real] for part in (self.best.alphas, self.best.betas))
        return Relaxed(member, neurons, *self.inputs(number), slopes, multipliers)

    def neurons(self, number: int) -> Tensor:
        """The neurons in the columns of one subproblem."""
        columns = self._columns(number)
        return columns.neurons[0, columns.real[0]]

    def _columns(self, number: int) -> Columns:
        return self.space.columns.take(self.subproblems.image[number : number + 1])

    def inputs(self, number: int) -> tuple[Tensor, Tensor]:
        """(lower, upper) bounds of the inputs of one subproblem's ``neurons``."""
        real = self._columns(number).real[0]
        return self.subproblems.lower[number, real], self.subproblems.upper[number, real]


OVERHEAD = 1e7
"""Multiplications of a pass over the whole network that take as long as a pass over a reduced one for few subproblems.
On a CPU ascents of 6 steps over a reduced CNN (190 neurons) take 13, 15, 27 and 87 ms for 2, 16, 64 and 512
subproblems; as a part of 512 over the whole CNN (660,000 multiplications for a form) they take 2, 13, 52 and 417."""


class Ascents:
    """Ascents on the slopes and multipliers of subproblems, over their image's reduced network or the whole one.

    Args:
        steps, rate, with_values: as in ``maximise``.
    """

    def __init__(self, space: SignSpace, steps: int, rate: float, with_values: bool):
        self.space, self.steps, self.rate, self.with_values = space, steps, rate, with_values
        rows = space.clauses.shape[1]
        self._most = ascents_at_a_time(space.network, rows, space.lower)
        self._work = rows * work_of_a_row(space.network, len(space.network.operations) - 1)

    def __call__(
        self, some: SignSubproblems, empty: Tensor | None = None, best: BestParameters | None = None
    ) -> Optimised:
        """
        Args:
            empty: (P,) bool, subproblems that need no bounds.
            best: as ``kept`` in ``maximise``; then no image has a reduced network.
        """
        space, parts = self.space, list[tuple[Tensor, Optimised]]()
        empty = torch.zeros_like(some.image, dtype=torch.bool) if empty is None else empty
        whole = torch.ones_like(some.image, dtype=torch.bool)
        for small, index in self._chosen(some):
            whole[index] = False
            own, columns = some.take(index), small.columns
            at = (own.image[:, None], space.clauses[own.goal])
            sub = Subproblems(
                small.box.take(torch.zeros_like(index)), space.rows[at], space.offsets[at], own.lower[:, columns],
                own.upper[:, columns], own.signs[:, columns],
            )  # fmt: skip
            found = self._over(small.network, sub, own.alphas[..., columns], own.betas[..., columns], empty[index])
            parts.append((index, self._in_all_columns(found, own, columns)))
        index = whole.nonzero().flatten()
        if len(index):
            own, columns = some.take(index), space.columns.take(some.image[index])
            found = self._over(space.network, space.linear(own), own.alphas, own.betas, empty[index], columns, best)
            if len(index) == len(some):
                return found
            parts.append((index, found))
        return joined([index for index, _ in parts], [found for _, found in parts])

    def _chosen(self, some: SignSubproblems) -> list[tuple[Reduced, Tensor]]:
        """The reduced networks to use, each with the numbers of its subproblems. An image with few of them goes with
        the others over the whole network, if that takes less time."""
        space, images = self.space, as_ints(torch.bincount(some.image).nonzero())
        found = [
            (space.reduced[image], (some.image == image).nonzero().flatten())
            for image in images
            if image in space.reduced
        ]
        rest = len(some) - sum(len(index) for _, index in found)
        few = [len(index) for _, index in found if len(index) * self._work < OVERHEAD]
        saved = sum(OVERHEAD - count * self._work for count in few)
        over_whole = 0 if rest else 2 * OVERHEAD  # what its first subproblem takes
        if saved > over_whole and rest + sum(few) <= self._most:
            found = [(small, index) for small, index in found if len(index) * self._work >= OVERHEAD]
        return found

    def _over(
        self, network: Network, sub: Subproblems, alphas: Tensor, betas: Tensor, empty: Tensor,
        columns: Columns | None = None, best: BestParameters | None = None,
    ) -> Optimised:  # fmt: skip
        return maximise(
            network, sub, alphas, betas, columns=columns, steps=self.steps, rate=self.rate,
            done=lambda best: (best.amax(1) > 0) | empty, kept=best, with_values=self.with_values,
        )  # fmt: skip

    def _in_all_columns(self, found: Optimised, some: SignSubproblems, columns: Tensor) -> Optimised:
        """Results over a reduced network as over the whole one."""

        def spread(values: Tensor, onto: Tensor) -> Tensor:
            return onto.index_copy(2, columns, values)

        assert found.betas is not None
        zero = torch.zeros_like(some.alphas)
        return replace(
            found, alphas=spread(found.alphas, some.alphas), betas=spread(found.betas, some.betas),
            forms=found.forms.reshape(*found.forms.shape[:2], *self.space.network.shapes[0]),
            reached=spread(found.reached, zero), values=spread(found.values, zero),
        )  # fmt: skip


class SignBounder(Bounder[SignSubproblems, SignBounds]):
    def __init__(self, space: SignSpace, search: Search, recording: bool):
        self.space, self.search, self.recording = space, search, recording
        self.budget = TighteningBudget(space, search)
        self.ascents = Ascents(space, search.steps, search.rate, with_values=True)
        self._images = set[int]()  # of the subproblems to be bounded

    @property
    def at_a_time(self) -> int:
        """As many as the networks of the images to be bounded next take together."""
        rows, like = self.space.clauses.shape[1], self.space.lower
        return max(1, min(2 * self.search.batch, *(
            ascents_at_a_time(network, rows, like) for network in self.space.networks(self._images)
        )))  # fmt: skip

    def packed(self, subproblems: SignSubproblems) -> PackedSigns:
        return self.space.packed(subproblems)

    def restored(self, packed: PackedSigns) -> SignSubproblems:
        return self.space.restored(packed)

    @property
    def evaluations(self) -> int:
        return 1 + self.search.steps

    def prepare(self, subproblems: OpenSubproblems) -> None:
        due = self.budget.due(subproblems)
        if len(due):
            with part("rebounding"):
                self.space.tighten(due, self.search.root_steps, self.search.clip)
        self._images = set(as_ints(unique(subproblems.image)))

    def release(self, open_: Tensor) -> None:
        self.space.release(open_)

    def bound(self, subproblems: SignSubproblems) -> SignBounds:
        some, ends, empty = self._tightened(subproblems)
        best = BestParameters() if self.recording else None
        optimised = self.ascents(some, empty, best)
        assert optimised.betas is not None
        bound = torch.where(empty, torch.inf, torch.maximum(some.bound, optimised.best.amax(1)))
        row = optimised.best.argmax(1)
        bound = torch.minimum(bound, some.level)
        some = replace(some, bound=bound, alphas=optimised.alphas, betas=optimised.betas)
        each = torch.arange(len(row), device=row.device)
        forms, constants, reached = (p[each, row] for p in (optimised.forms, optimised.constants, optimised.reached))
        some = self.space.clipped(some, forms.flatten(1), constants, reached < 0)
        point = minimiser(optimised, self.space.region.take(some.image), row)
        return SignBounds(some, self.space, ends, empty, optimised, row, point, best)

    def _tightened(self, some: SignSubproblems) -> tuple[SignSubproblems, tuple[Tensor, Tensor], Tensor]:
        """(subproblems, ends, empty): the subproblems with their neurons' bounds recomputed under their signs; these
        bounds as computed, which may cross; (D,) bool, where they do."""
        space, some = self.space, self.space.clamped(some)
        lower, upper, columns = some.lower, some.upper, space.columns.take(some.image)
        again = self._rebounded(some).nonzero().flatten()
        if len(again):
            own = some.take(again)
            linear = space.linear(own)
            lowers, uppers = space.neurons.apart(linear.lower), space.neurons.apart(linear.upper)
            given = {place: Bounds(lowers[place], uppers[place]) for place in lowers}
            with part("rebounding"):
                tighter = crown_bounds(space.network, space.region.take(own.image), given)
            low = space.neurons.together({place: bounds.lower for place, bounds in tighter.items()})
            up = space.neurons.together({place: bounds.upper for place, bounds in tighter.items()})
            low, up = (space.columns.take(own.image).gathered(end, 0.0) for end in (low, up))
            lower, upper = lower.index_copy(0, again, low), upper.index_copy(0, again, up)
        empty, ends, upper = crossed(columns, lower, upper), (lower, upper), torch.maximum(lower, upper)
        if len(again) or self.search.tighten:  # clipped bounds may have made more neurons stable
            signs = torch.where(some.level.isfinite().unsqueeze(1), self.space.signs_of(some, lower, upper), some.signs)
            some = replace(some, signs=signs)
        return replace(some, lower=lower, upper=upper), ends, empty

    def _rebounded(self, some: SignSubproblems) -> Tensor:
        """(D,) bool, the subproblems whose neurons' bounds are recomputed: all with ``search.tighten``; otherwise, in
        networks with other functions than ReLUs, leaves and others after every ``REBOUND_EVERY`` splits."""
        assumed = some.signs != 0
        if self.search.tighten:
            return assumed.any().expand(len(some))
        if self.space.network.piecewise_linear:
            return torch.zeros_like(some.image, dtype=torch.bool)
        depth = assumed.sum(1)
        leaf = ~(self.space.undecided(some) & ~assumed).any(1)
        return (depth > 0) & (leaf | (depth % REBOUND_EVERY == 0))


class TighteningBudget:
    """When to tighten the bounds of an image's neurons: once, after its search has cost as much. So it costs easy
    images nothing, and no image more than twice what was best for it.

    The cost is counted in multiplications of backward passes, so that it does not depend on time.
    """

    def __init__(self, space: SignSpace, search: Search):
        network, steps = space.network, search.root_steps
        self.spent = torch.zeros(len(space.lower), dtype=torch.float64, device=space.lower.device)
        self.cost = torch.full_like(self.spent, torch.inf)
        a_row = work_of_a_row(network, len(network.operations) - 1)
        self.bounding = space.clauses.shape[1] * passes(search.steps) * a_row
        if steps and network.nonlinear:
            work = tightening_work(network, space.known.bounds, steps)
            self.cost = torch.where(work > 0, work, torch.inf)

    def due(self, subproblems: OpenSubproblems) -> Tensor:
        """The numbers of the images to tighten before their ``subproblems`` are bounded."""
        work = torch.full((len(subproblems),), self.bounding, dtype=torch.float64, device=self.spent.device)
        self.spent.index_add_(0, subproblems.image, work)
        due = (self.spent >= self.cost).nonzero().flatten()
        self.cost[due] = torch.inf
        return due


class SignSplitter(Splitter[SignSubproblems, SignBounds]):
    def __init__(self, space: SignSpace, search: Search):
        self.space, self.search = space, search
        self.bounds = Ascents(space, 0, search.rate, with_values=False)

    @property
    def at_a_time(self) -> int:
        """As many as the settings say, if these and their children are a small part of the open ones."""
        numbers = self.space.columns.real.shape[1] * (2 + 2 * self.space.clauses.shape[1])
        most = memory.kept(self.space.lower) // (8 * numbers * self.space.lower.element_size())
        return max(1, min(self.search.batch, most))

    def options(self, bounded: SignBounds) -> Tensor:
        some = bounded.subproblems
        columns = self.space.columns.take(some.image)
        space = self.space
        score = scores(bounded.optimised, columns, space.kinks, some.lower, some.upper, bounded.row, some.bound)
        return torch.where(space.signed, score, -torch.inf)

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
        neurons = as_ints(self.space.columns.neurons[children.image].gather(1, at))
        return [Sign(neuron, sign) for neuron, sign in zip(neurons, as_ints(children.signs.gather(1, at)))]

    def _halves(self, parents: SignSubproblems) -> list[SignSubproblems]:
        at = parents.branch.unsqueeze(1)
        return [replace(parents, signs=parents.signs.scatter(1, at, sign)) for sign in (1, -1)]

    def _bounds_of(self, some: SignSubproblems) -> Tensor:
        """(D,) bounds at the subproblems' own slopes and multipliers, without optimisation."""
        return self.bounds(self.space.clamped(some)).best.amax(1)


class LinearProgramSolver(LeafSolver[SignSubproblems, SignBounds]):
    """Solves the linear program of a subproblem; it is exact in a leaf of a network of ReLUs, which is affine there. In
    other networks a leaf that stays open ends the search of its image: no split can prove it."""

    probing = PROBING

    def __init__(self, space: SignSpace, exact: Network, programs: int):
        self.space, self.exact, self.programs = space, exact, programs
        self.ends_search = not space.network.piecewise_linear
        self.asked, self.closed = (
            [0] * len(space.lower) for _ in range(2)
        )  # by image, of subproblems that are no leaf

    def wants(self, bounded: SignBounds) -> Tensor:
        depth = (bounded.subproblems.signs != 0).sum(1)
        pays = [asked < TRIALS or PAYS * closed >= asked for asked, closed in zip(self.asked, self.closed, strict=True)]
        paying = torch.tensor(pays, device=depth.device)[bounded.subproblems.image]
        return paying & (depth % PROGRAM_EVERY == 0) & (depth > 0) & self._small(bounded.subproblems)

    def solve(self, bounded: SignBounds, index: Tensor, leaf: Tensor, progress: ImageProgress) -> SolverResult:
        bounds, undecided, proofs = list[float](), list[str | None](), list[Proof | None]()
        images = as_ints(bounded.subproblems.image[index])
        for image, number, last in zip(images, as_ints(index), as_bools(leaf), strict=True):
            bound, why, proof = -math.inf, None, None
            if progress.is_unfinished(image):
                one = bounded.subproblems.take(torch.tensor([number], device=index.device))
                linear = self.space.linear(one)
                solution = self._program(one, linear)
                if solution.point is not None:
                    progress.refute(image, self._point(image, solution.point))
                bound = min(self._bound_of(one, linear, solution), float(one.level))
                self.asked[image] += not last
                self.closed[image] += bound > 0 and not last
                if bound > 0:
                    proof = self._proof(bounded, number, solution)
                elif last and progress.is_unfinished(image):
                    why = self._doubt(image, bound)
            bounds.append(bound)
            undecided.append(why)
            proofs.append(proof)
        return SolverResult(torch.tensor(bounds, dtype=torch.float64, device=index.device), undecided, proofs)

    def probe(self, one: SignSubproblems) -> Tensor | None:
        """The linear program's minimiser, which satisfies the assumed signs; None where there are too many neurons."""
        if not bool(self._small(one)):
            return None
        point = self._program(one, self.space.linear(one)).point
        return None if point is None else self._point(int(one.image), point)

    def _small(self, some: SignSubproblems) -> Tensor:
        """(P,) bool, whether few enough neurons are open for a linear program."""
        return (self.space.undecided(some) & (some.signs == 0)).sum(1) <= self.programs

    def _program(self, one: SignSubproblems, linear: Subproblems) -> LeafSolution:
        space, image, at = self.space, int(one.image), self._members(one, 0)
        region = space.problem.region.take(one.image).to(torch.float64)
        assert linear.signs is not None
        return solve_leaf(
            self.exact, region, space.rows[image, at].double(), space.offsets[image, at].double(),
            linear.lower[0].double(), linear.upper[0].double(), linear.signs[0],
        )  # fmt: skip

    def _bound_of(self, one: SignSubproblems, linear: Subproblems, solution: LeafSolution) -> float:
        """The solution's bound in the arithmetic of the search."""
        if self.space.network.rounding is None:
            return solution.bound
        space, image, at = self.space, int(one.image), self._members(one, 0)
        inside = replace(linear, forms=space.rows[image, at][None], offsets=space.offsets[image, at][None])
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
        number = torch.tensor([image], device=self.space.lower.device)
        return self.space.problem.region.take(number).nearest(point[None])[0]

    def _doubt(self, image: int, bound: float) -> str:
        if not self.space.network.piecewise_linear:
            return RELAXED
        scale = float(self.space.network(self.space.region.images[image : image + 1]).abs().max().clamp(min=1))
        return "within tolerance" if bound > -TOLERANCE * scale else "leaf"
