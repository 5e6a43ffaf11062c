"""Branch and bound on the signs of ReLU inputs, with beta-CROWN's bounds (arXiv 2103.06624) and subproblems of many
images in one batch.

A subproblem is one clause of one image's specification under assumed signs. Each round takes the worst-bounded ones of
every image, splits each at one neuron, and bounds the halves. A leaf, where every sign is known, goes to an LP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..bounds import Bounds
from ..bounds.clock import OutOfTime, look, now, until
from ..bounds.crown import crown_bounds, rows_at_a_time
from ..bounds.folded import Folded
from .branching import look_ahead, minimiser, scores
from .known import Known
from .lp import rounded_bound, solve_leaf
from .optimise import Neurons, Subproblems, maximise, starting_slopes
from .problem import Problem
from .search import EMPTY, PROBING, PROGRAM_EVERY, TOLERANCE, Outcome, Search
from .tree import Tree, columns_of, in_turns, rows_of, scattered


def branch_and_bound(
    problem: Problem,
    known: Known,
    exact: Folded,
    search: Search,
    timeout: float,
    violates: Callable[[int, Tensor], bool],
) -> Outcome:
    """Prove or refute the clauses that ``known`` leaves open.

    Args:
        exact: the network in float64, for the leaves.
        timeout: seconds of each image's share of the time; as many again on the wall clock for each image at most. The
            wall clock is looked at within rounds; what a round has begun by then counts as not begun.
        violates: whether an input (*shape) of the given image's region is a counterexample, by replay.
    """
    return _Search(problem, known, exact, search, timeout, violates).run()


class _Search:
    def __init__(self, problem: Problem, known: Known, exact: Folded, search: Search, timeout: float, violates):
        self.problem, self.network, self.exact = problem, known.network, exact
        self.search, self.timeout, self.violates = search, timeout, violates
        self.region = known.region_of(problem)
        self.rows, self.offsets = known.rows_of(problem.specification)
        self.neurons = Neurons.of(known.network)
        count, device = len(problem), problem.index.device
        self.lower, self.upper = self.neurons.ends(known.bounds, known.rows)
        open_ = (self.lower < 0) & (self.upper > 0)
        self.columns = columns_of(open_)
        self.rows_of, self.clauses = rows_of(problem.specification.clauses)
        worst = known.rows[:, self.rows_of].amax(-1)  # (B, clauses)
        # the least bound of each clause's closed subproblems
        self.leaves = torch.where(worst > 0, worst, torch.inf)
        self.root = worst
        self.seconds = torch.zeros(count, dtype=torch.float64)
        self.probing = 0.0  # seconds
        self.splits = [0] * count
        self.counterexamples: list[Tensor | None] = [None] * count
        self.reasons: list[str | None] = [None] * count
        self.doubts: list[str | None] = [None] * count  # why a leaf was not proved; others may hold a counterexample
        image, clause = (~(worst > 0)).nonzero(as_tuple=True)
        slopes = known.alphas
        if slopes is None:
            slopes = starting_slopes(self.lower, self.upper, known.rows.shape[1])
        alphas = self._gathered(slopes[image[:, None], self.rows_of[clause]], image)
        lower, upper = (self._gathered(end[image].unsqueeze(1), image)[:, 0] for end in (self.lower, self.upper))
        self.tree = Tree(
            image, clause, worst[image, clause], torch.zeros_like(image),
            torch.zeros(len(image), self.columns.shape[1], dtype=torch.int8, device=device),
            lower, upper, alphas, torch.zeros_like(alphas),
        )  # fmt: skip

    def run(self) -> Outcome:
        started = now()
        try:
            with until(started + self.timeout * len(self.problem)):
                self._search(started)
        except OutOfTime:
            self._give_up(set(self.tree.image.tolist()), "wall clock")
        count = len(self.problem)
        reasons = [reason or doubt for reason, doubt in zip(self.reasons, self.doubts, strict=True)]
        given_up = torch.tensor([reason is not None for reason in reasons], dtype=torch.bool)
        refuted = torch.tensor([found is not None for found in self.counterexamples], dtype=torch.bool)
        lower = torch.maximum(self.root, self.leaves).amin(-1) if self.root.numel() else self.root.new_zeros(count)
        return Outcome(~(given_up | refuted), self.counterexamples, lower, self.seconds, reasons)

    def _search(self, started: float) -> None:
        roots, self.tree = self.tree, self.tree.take(torch.arange(0))
        self._bound(roots)
        while len(self.tree):
            look()
            size = min(self.search.batch, rows_at_a_time(self.network, 2, self.lower))
            chosen = in_turns(self.tree.image, self.tree.bound, size)
            if self._probe(self.tree.take(chosen), started):  # an image has gone
                continue
            left = torch.ones(len(self.tree), dtype=torch.bool, device=chosen.device)
            left[chosen] = False
            parents, self.tree = self.tree.take(chosen), self.tree.take(left)
            self._bound(self._halves(parents))

    def _probe(self, parents: Tree, started: float) -> bool:
        """Whether LPs of the relaxed subproblems, the first ones, for a part of the time, found a counterexample: an
        LP's minimiser meets the assumed signs. Its bound is left alone, so that bounds do not depend on time."""
        found = False
        for number, image in enumerate(parents.image.tolist()):
            begun = now()
            if self.probing > PROBING * (begun - started):
                break
            if self._wanted(image):
                one = parents.take(torch.tensor([number], device=parents.image.device))
                signs, lower, upper = self.dense(one)
                self._program(one, 0, lower[0], upper[0], signs[0])
                found = found or not self._wanted(image)
                spent = now() - begun
                self.probing += spent
                self.seconds[image] += spent
        return found

    def _halves(self, parents: Tree) -> Tree:
        at = parents.branch.unsqueeze(1)
        halves = [replace(parents, signs=parents.signs.scatter(1, at, sign)) for sign in (1, -1)]
        for image in parents.image.tolist():
            self.splits[image] += 1
        return halves[0].joined(halves[1])

    def _bound(self, tree: Tree) -> None:
        """Bound subproblems; keep those that stay open, each with the neuron to split at."""
        size = max(1, min(2 * self.search.batch, rows_at_a_time(self.network, 1, self.lower)))
        index = torch.arange(len(tree), device=tree.image.device)
        for part in index.split(size) if len(tree) else ():
            started = now()
            batch = tree.take(part)
            images = batch.image.cpu()
            try:
                self._bound_batch(batch)
            except OutOfTime:
                self.tree = self.tree.joined(tree.take(index[part[0] :]))
                raise
            finally:
                share = (now() - started) / len(part)
                self.seconds.index_add_(0, images, torch.full((len(part),), share, dtype=torch.float64))
            late = {i for i in set(images.tolist()) if self.seconds[i] > self.timeout}
            most = self.search.most
            many = {i for i in set(images.tolist()) if most is not None and self.splits[i] >= most}
            self._give_up(late, "timeout")
            self._give_up(many - late, f"{most} splits")

    def _bound_batch(self, tree: Tree) -> None:
        tree, empty = self._tightened(tree)
        sub = self.subproblems(tree)
        signs, lower, upper = sub.signs, sub.lower, sub.upper
        assert signs is not None
        found = maximise(
            self.network, sub, self._spread(tree.alphas, tree, 0.5), self._spread(tree.betas, tree, 0.0),
            steps=self.search.steps, rate=self.search.rate,
            done=lambda best: (best.amax(1) > 0) | empty,
        )  # fmt: skip
        bound = torch.where(empty, torch.inf, torch.maximum(tree.bound, found.best.amax(1)))
        assert found.betas is not None
        alphas, betas = (self._gathered(values, tree.image) for values in (found.alphas, found.betas))
        closed = bound > 0
        row = found.best.argmax(1)
        point = minimiser(found, sub.region, row)
        self._try(tree, ~closed, point)
        cost = scores(self.network, found, lower, upper, row, point)
        cost = torch.cat([cost, torch.full_like(cost[:, :1], -torch.inf)], 1)
        cost = cost.gather(1, self.columns[tree.image])  # (D, U), -inf where nothing is left to split
        leaf = ~closed & ~(cost > -torch.inf).any(1)
        deep = ~closed & ((tree.signs != 0).sum(1) % PROGRAM_EVERY == 0) & (tree.signs != 0).any(1)
        for number in (leaf | deep).nonzero().flatten().tolist():
            solved = self._solve(tree, number, lower[number], upper[number], signs[number], bool(leaf[number]))
            bound[number] = max(float(bound[number]), solved)
        closed = bound > 0
        wanted = torch.tensor([self._wanted(i) for i in tree.image.tolist()], device=closed.device)
        keep = ~closed & ~leaf & wanted
        self._close(tree, bound, ~keep)
        index = keep.nonzero().flatten()
        if len(index):
            kept = replace(tree, bound=bound, alphas=alphas, betas=betas).take(index)
            branch = look_ahead(self, kept, cost[index], self.search.candidates)
            self.tree = self.tree.joined(replace(kept, branch=branch))

    def _tightened(self, tree: Tree) -> tuple[Tree, Tensor]:
        """With its neurons bounded anew under its signs; and which subproblems (D,) nothing satisfies."""
        lower, upper = tree.lower, tree.upper
        lower = torch.where(tree.signs > 0, lower.clamp(min=0), lower)
        upper = torch.where(tree.signs < 0, upper.clamp(max=0), upper)
        tree = replace(tree, lower=lower, upper=upper)
        if self.search.tighten and bool((tree.signs != 0).any()):
            _, lower, upper = self.dense(tree)
            given = {
                place: Bounds(low, up)
                for (place, low), up in zip(
                    self.neurons.apart(lower).items(), self.neurons.apart(upper).values(), strict=True
                )
            }
            found = crown_bounds(self.network, self.region.take(tree.image), given)
            ends = (
                self.neurons.together({place: getattr(b, e) for place, b in found.items()}) for e in ("lower", "upper")
            )
            lower, upper = (self._gathered(end.unsqueeze(1), tree.image)[:, 0] for end in ends)
        crossed = lower - upper
        real = self.columns[tree.image] < self.lower.shape[1]
        empty = (real & (crossed > EMPTY * (1 + lower.abs()))).any(1)
        return replace(tree, lower=lower, upper=torch.maximum(lower, upper)), empty

    def dense(self, tree: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """(signs, lower, upper), each (D, N)."""
        signs = self._spread(tree.signs.unsqueeze(1), tree, 0)[:, 0]
        lower, upper = (
            scattered(whole[tree.image], self.columns[tree.image], part)
            for whole, part in ((self.lower, tree.lower), (self.upper, tree.upper))
        )
        return signs, lower, upper

    def subproblems(self, tree: Tree) -> Subproblems:
        signs, lower, upper = self.dense(tree)
        at = (tree.image[:, None], self.rows_of[tree.clause])
        return Subproblems(self.region.take(tree.image), self.rows[at], self.offsets[at], lower, upper, signs)

    def bounds_of(self, tree: Tree) -> Tensor:
        """(D,) bounds with the slopes and multipliers that the subproblems have."""
        lower = torch.where(tree.signs > 0, tree.lower.clamp(min=0), tree.lower)
        upper = torch.where(tree.signs < 0, tree.upper.clamp(max=0), tree.upper)
        sub = self.subproblems(replace(tree, lower=lower, upper=upper))
        alphas, betas = self._spread(tree.alphas, tree, 0.5), self._spread(tree.betas, tree, 0.0)
        return maximise(self.network, sub, alphas, betas, steps=0).best.amax(1)

    def _spread(self, values: Tensor, tree: Tree, fill: float) -> Tensor:
        """(D, R, U) of columns → (D, R, N) of neurons."""
        out = values.new_full((*values.shape[:2], self.lower.shape[1]), fill)
        return scattered(out, self.columns[tree.image].unsqueeze(1).expand_as(values), values)

    def _gathered(self, values: Tensor, image: Tensor) -> Tensor:
        """(D, R, N) of neurons → (D, R, U) of columns."""
        columns = self.columns[image].unsqueeze(1).expand(-1, values.shape[1], -1)
        return torch.cat([values, values[..., :1]], -1).gather(2, columns)

    def _close(self, tree: Tree, bound: Tensor, closed: Tensor) -> None:
        for number in closed.nonzero().flatten().tolist():
            image, clause = int(tree.image[number]), int(tree.clause[number])
            self.leaves[image, clause] = min(float(self.leaves[image, clause]), float(bound[number]))

    def _wanted(self, image: int) -> bool:
        return self.counterexamples[image] is None and self.reasons[image] is None

    def _try(self, tree: Tree, open_: Tensor, points: Tensor) -> None:
        """Bounds' own minimisers are good candidates for counterexamples."""
        specification = self.problem.specification.subset(tree.image)
        points = self.problem.region.take(tree.image).nearest(points)
        suspected = open_ & ~(specification.worst(specification.values(self.network(points.to(self.rows.dtype)))) > 0)
        for number in suspected.nonzero().flatten().tolist():
            self._refute(int(tree.image[number]), points[number])

    def _refute(self, image: int, point: Tensor) -> bool:
        if self.counterexamples[image] is None and self.violates(image, point):
            self.counterexamples[image] = point
            self._drop({image})
        return self.counterexamples[image] is not None

    def _give_up(self, images: set[int], reason: str) -> None:
        unfinished = {i for i in images if self._wanted(i) and bool((self.tree.image == i).any())}
        for image in unfinished:
            self.reasons[image] = reason
        self._drop(unfinished)

    def _drop(self, images: set[int]) -> None:
        """Without an image's subproblems; what is left open of a clause bounds it."""
        keep = torch.tensor([i not in images for i in self.tree.image.tolist()], dtype=torch.bool)
        keep = keep.to(self.tree.image.device)
        self._close(self.tree, self.tree.bound, ~keep)
        self.tree = self.tree.take(keep)

    def _solve(self, tree: Tree, number: int, lower: Tensor, upper: Tensor, signs: Tensor, leaf: bool) -> float:
        """The bound of a linear program; in a leaf, where the network is affine, it is the last word."""
        image = int(tree.image[number])
        if not self._wanted(image):
            return float(tree.bound[number])
        bound = self._program(tree, number, lower, upper, signs)
        if leaf and not bound > 0 and self._wanted(image):
            scale = float(self.network(self.region.images[image : image + 1]).abs().max().clamp(min=1))
            self.doubts[image] = "within tolerance" if bound > -TOLERANCE * scale else "leaf"
        return bound

    def _program(self, tree: Tree, number: int, lower: Tensor, upper: Tensor, signs: Tensor) -> float:
        """The bound of a linear program's dual; its minimiser is tried as a counterexample."""
        image, clause = int(tree.image[number]), int(tree.clause[number])
        region = self.problem.region.take(tree.image[number : number + 1])
        at = self.problem.specification.clauses == clause
        rows, offsets = self.rows[image, at], self.offsets[image, at]
        leaf = solve_leaf(
            self.exact, region.to(torch.float64), rows.double(), offsets.double(), lower.double(), upper.double(), signs
        )
        if leaf.point is not None:
            self._refute(image, region.nearest(leaf.point[None])[0])
        if self.network.rounding is None:
            return leaf.bound
        inside = Subproblems(self.region.take(tree.image[number : number + 1]), rows[None], offsets[None],
                             lower[None], upper[None], signs[None])  # fmt: skip
        return rounded_bound(self.network, inside, leaf)
