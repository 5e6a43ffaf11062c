"""Branch and bound: one search for every way to bound, to split, and to settle a leaf.

A subproblem is part of one image's set, or of the assumptions that can be made on it, with a lower bound of what is to
be proved there. Each round takes the worst-bounded open subproblems, images taking turns, splits each into children
that cover it, and bounds these. Those whose bound is positive are closed; the others stay open, until their image is
refuted by a replayed counterexample or given up. An image is proved when all its subproblems are closed by a proof.

What depends on the kind of subproblem are three parts: a ``Bounder``, a ``Splitter`` and a ``LeafSolver``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from ..bounds.clock import OutOfTime, look, now, until
from ..bounds.network import Network
from .problem import Problem
from .search_record import Decision, Proof, SearchRecord

Violates = Callable[[int, Tensor], bool]
"""Whether an input (*shape) of the given image's set is a counterexample, by replay."""


@dataclass(frozen=True)
class OpenSubproblems:
    """A table of P subproblems. Every field has P rows.

    Args:
        image: (P,) int64, the position of each one's image in the batch.
        goal: (P,) int64, which of its image's goals it bounds: the clause, or 0 where all are bounded together.
        bound: (P,) lower bounds.
        node: (P,) int64, each one's number in the search's record; -1 without one.
    """

    image: Tensor
    goal: Tensor
    bound: Tensor
    node: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: Tensor) -> Self:
        """Some of them: by numbers, or (P,) bool."""
        return type(self)(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def joined(self, other: Self) -> Self:
        return type(self)(**{f.name: torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)})


S = TypeVar("S", bound=OpenSubproblems)


@dataclass(frozen=True, eq=False)
class Bounded(ABC, Generic[S]):
    """Subproblems after they were bounded; subclasses add what their splitter and leaf solver continue from."""

    subproblems: S

    @abstractmethod
    def points(self, index: Tensor) -> Iterable[Tensor]:
        """Candidates for counterexamples in the subproblems ``index``: tensors (len(index), *shape) of points in the
        images' own sets, each computed when it is asked for."""

    @abstractmethod
    def proof(self, number: int) -> Proof:
        """What proves the positive bound of subproblem ``number``. Called only for a search that is recorded."""


B = TypeVar("B", bound=Bounded[Any])


class Bounder(ABC, Generic[S, B]):
    """Computes lower bounds of batches of subproblems."""

    @property
    @abstractmethod
    def at_a_time(self) -> int:
        """Subproblems that are bounded together, >= 1."""

    @abstractmethod
    def bound(self, subproblems: S) -> B:
        """The subproblems with bounds that are no lower than before, and parameters to continue from. inf where nothing
        satisfies the assumptions.

        Raises:
            OutOfTime: before all are bounded.
        """


class Splitter(ABC, Generic[S, B]):
    """Chooses the decision that each subproblem is split at, and makes its children."""

    @property
    @abstractmethod
    def at_a_time(self) -> int:
        """Subproblems that are split in one round, >= 1."""

    @abstractmethod
    def options(self, bounded: B) -> Tensor:
        """(P, U) scores of the decisions, -inf where one is impossible. Without any the subproblem is a leaf."""

    @abstractmethod
    def decide(self, bounded: B, options: Tensor, index: Tensor) -> S:
        """The subproblems ``index`` with their decision chosen; each has an option."""

    @abstractmethod
    def children(self, parents: S) -> S:
        """Subproblems that together cover the parents. Each inherits its parent's ``bound`` and ``node``."""

    @abstractmethod
    def decisions(self, children: S) -> Sequence[Decision]:
        """What sets each child apart from its parent. Called only for a search that is recorded."""


@dataclass(frozen=True)
class SolverResult:
    """What a leaf solver found for L subproblems.

    Args:
        bound: (L,); inf where nothing satisfies the assumptions, -inf where nothing was found.
        undecided: why a leaf stays without proof; None for one that is proved, refuted or no leaf.
        proofs: of the positive bounds.
    """

    bound: Tensor
    undecided: Sequence[str | None]
    proofs: Sequence[Proof | None]


class LeafSolver(ABC, Generic[S, B]):
    """Settles subproblems that cannot be split further, and others where that pays."""

    ends_search: bool
    """Whether a leaf that stays undecided ends the search of its image. Otherwise the search goes on, for others may
    hold a counterexample."""

    probing: float = 0.0
    """Share of the search's time that goes into ``probe``."""

    def wants(self, bounded: B) -> Tensor:
        """(P,) bool: which subproblems it is asked about beside leaves."""
        return torch.zeros_like(bounded.subproblems.image, dtype=torch.bool)

    @abstractmethod
    def solve(self, bounded: B, index: Tensor, leaf: Tensor, progress: ImageProgress) -> SolverResult:
        """Bound the subproblems ``index`` (L,) as well as possible; candidates that are met go to ``progress.refute``.

        Args:
            leaf: (L,) bool, which of them cannot be split.
        Raises:
            OutOfTime: before all are solved.
        """

    def probe(self, one: S) -> Tensor | None:
        """A candidate (*shape) for a counterexample in an open subproblem that is about to be split."""
        return None


class ImageProgress:
    """How far the search is with each of B images.

    ``counterexamples``; ``reasons`` why an image was given up; ``doubts`` why a leaf of it was not proved; ``seconds``
    (B,) of its share of the time; ``splits`` of its subproblems.
    """

    def __init__(self, count: int, timeout: float, violates: Violates):
        self.timeout, self._violates = timeout, violates
        self.counterexamples: list[Tensor | None] = [None] * count
        self.reasons: list[str | None] = [None] * count
        self.doubts: list[str | None] = [None] * count
        self.seconds = torch.zeros(count, dtype=torch.float64)
        self.splits = [0] * count

    def is_unfinished(self, image: int) -> bool:
        return self.counterexamples[image] is None and self.reasons[image] is None

    def unfinished(self, images: Tensor) -> Tensor:
        """(P,) bool of images (P,): neither refuted nor given up."""
        every = [self.is_unfinished(image) for image in range(len(self.reasons))]
        return torch.tensor(every, dtype=torch.bool, device=images.device)[images]

    def refute(self, image: int, point: Tensor) -> bool:
        """Whether the image has a counterexample: an earlier one, or ``point`` (*shape), which is replayed."""
        if self.counterexamples[image] is None and self._violates(image, point):
            self.counterexamples[image] = point
        return self.counterexamples[image] is not None

    def time_left(self, image: int) -> float:
        return self.timeout - float(self.seconds[image])

    @contextmanager
    def charged(self, images: Tensor) -> Iterator[None]:
        """The time of what is done inside, shared equally by subproblems of ``images`` (P,)."""
        started = now()
        try:
            yield
        finally:
            share = (now() - started) / len(images)
            self.seconds.index_add_(0, images.cpu(), torch.full((len(images),), share, dtype=torch.float64))


@dataclass(frozen=True)
class Outcome:
    """A search's answer for B images.

    Args:
        proved: (B,) bool, whether all goals are.
        counterexamples: of each image, or None.
        lower: (B,) lower bounds of the worst margin.
        seconds: (B,).
        reasons: why an image is neither proved nor refuted.
    """

    proved: Tensor
    counterexamples: list[Tensor | None]
    lower: Tensor
    seconds: Tensor
    reasons: list[str | None]


class BranchAndBound(Generic[S, B]):
    """A search that proves or refutes the goals of a batch of problems.

    Args:
        network: the folded one, in which candidates are tried before they are replayed.
        known: (B, G) lower bounds of each image's goals before the search.
        roots: subproblems that cover every goal which ``known`` leaves open.
        timeout: seconds of each image's share of the time; as many again on the wall clock for each image at most. The
            wall clock is looked at within rounds; what a round has begun by then counts as not begun.
        most: splits of one image at which it is given up.
        record: is given the tree of subproblems, with what closed each.
    """

    def __init__(
        self,
        problem: Problem,
        network: Network,
        known: Tensor,
        roots: S,
        bounder: Bounder[S, B],
        splitter: Splitter[S, B],
        leaf: LeafSolver[S, B],
        *,
        timeout: float,
        violates: Violates,
        most: int | None = None,
        record: SearchRecord | None = None,
    ):
        self.problem, self.network, self.known = problem, network, known
        self.bounder, self.splitter, self.leaf = bounder, splitter, leaf
        self.most, self.record = most, record
        self.progress = ImageProgress(len(problem), timeout, violates)
        self.roots = roots.take(~(roots.bound > 0))
        self.open = roots.take(roots.image[:0])
        self._closed = torch.where(known > 0, known, torch.inf)  # (B, G), the least bound of what is closed
        self._started, self._probed = now(), 0.0

    def run(self) -> Outcome:
        self._started = now()
        progress, count = self.progress, len(self.problem)
        try:
            with until(self._started + progress.timeout * count):
                self._search()
        except OutOfTime:
            self._give_up(set(self.open.image.tolist()), "wall clock")
            self._drop_finished()
        reasons = [reason or doubt for reason, doubt in zip(progress.reasons, progress.doubts, strict=True)]
        ends = zip(progress.counterexamples, reasons, strict=True)
        proved = torch.tensor([found is None and reason is None for found, reason in ends], dtype=torch.bool)
        lower = torch.maximum(self.known, self._closed).amin(-1)
        return Outcome(proved, progress.counterexamples, lower, progress.seconds, reasons)

    def _search(self) -> None:
        self._examine(self._recorded(self.roots, root=True))
        while len(self.open):
            look()
            chosen = in_turns(self.open.image, self.open.bound, self.splitter.at_a_time)
            if self.leaf.probing and self._probe(self.open.take(chosen)):
                continue  # an image has gone
            left = torch.ones(len(self.open), dtype=torch.bool, device=chosen.device)
            left[chosen] = False
            parents, self.open = self.open.take(chosen), self.open.take(left)
            for image in parents.image.tolist():
                self.progress.splits[image] += 1
            self._examine(self._recorded(self.splitter.children(parents), root=False))

    def _recorded(self, subproblems: S, root: bool) -> S:
        """With their numbers in the record."""
        if self.record is None:
            return subproblems
        decisions = [None] * len(subproblems) if root else self.splitter.decisions(subproblems)
        nodes = self.record.add(subproblems.node, subproblems.image, subproblems.goal, decisions)
        return replace(subproblems, node=nodes)

    def _probe(self, parents: S) -> bool:
        """Whether probes of the first of them, for a part of the time, refuted an image. Bounds are left alone, so that
        they do not depend on time."""
        found = False
        for number, image in enumerate(parents.image.tolist()):
            begun = now()
            if self._probed > self.leaf.probing * (begun - self._started):
                break
            if self.progress.is_unfinished(image):
                one = torch.tensor([number], device=parents.image.device)
                with self.progress.charged(parents.image[one]):
                    point = self.leaf.probe(parents.take(one))
                    found = (point is not None and self.progress.refute(image, point)) or found
                self._probed += now() - begun
        self._drop_finished()
        return found

    def _examine(self, subproblems: S) -> None:
        """Bound subproblems; close them, or keep them open with their decision."""
        every = torch.arange(len(subproblems), device=subproblems.image.device)
        for index in every.split(self.bounder.at_a_time) if len(every) else ():
            batch = subproblems.take(index)
            try:
                self._examine_batch(batch)
            except OutOfTime:
                self.open = self.open.joined(subproblems.take(every[index[0] :]))
                raise
            images = set(batch.image.tolist())
            self._give_up({i for i in images if self.progress.time_left(i) < 0}, "timeout")
            if self.most is not None:
                self._give_up({i for i in images if self.progress.splits[i] >= self.most}, f"{self.most} splits")
            self._drop_finished()

    def _examine_batch(self, batch: S) -> None:
        """Nothing is closed or kept before all the work is done: out of time, the whole batch is still open."""
        progress, at_first = self.progress, batch
        wanted = progress.unfinished(batch.image)
        finished = at_first.take(~wanted)
        batch = batch.take(wanted)
        if not len(batch):
            self._close(finished)
            return
        with progress.charged(batch.image):
            bounded = self.bounder.bound(batch)
            open_ = ~(bounded.subproblems.bound > 0)
            self._try(bounded, open_)
            options = self.splitter.options(bounded) if bool(open_.any()) else open_.new_zeros(len(batch), 0).double()
        leaf = open_ & ~(options > -torch.inf).any(1)
        asked = leaf | (open_ & self.leaf.wants(bounded))
        index = (asked & progress.unfinished(batch.image)).nonzero().flatten()
        solved = None
        subproblems: S = bounded.subproblems
        if len(index):
            with progress.charged(batch.image[index]):
                solved = self.leaf.solve(bounded, index, leaf[index], progress)
            bound = subproblems.bound.clone()
            bound[index] = torch.maximum(bound[index], solved.bound.to(bound))
            subproblems = replace(subproblems, bound=bound)
            bounded = replace(bounded, subproblems=subproblems)
        keep = ~(subproblems.bound > 0) & ~leaf & progress.unfinished(batch.image)
        kept, chosen = keep.nonzero().flatten(), None
        if len(kept):
            with progress.charged(batch.image[kept]):
                chosen = self.splitter.decide(bounded, options, kept)
        self._close(finished)
        self._close(subproblems, ~keep, bounded, dict(zip(index.tolist(), solved.proofs)) if solved else {})
        if chosen is not None:
            self.open = self.open.joined(chosen)
        if solved is not None:
            self._doubt(batch.image[index].tolist(), solved.undecided)

    def _try(self, bounded: B, open_: Tensor) -> None:
        """Bounds' own minimisers are good candidates for counterexamples."""
        index = open_.nonzero().flatten()
        if not len(index):
            return
        image = bounded.subproblems.image[index]
        specification = self.problem.specification.subset(image)
        for points in bounded.points(index):
            outputs = self.network(points.to(self.known.dtype))
            wrong = ~(specification.worst(specification.values(outputs)) > 0)
            for number in wrong.nonzero().flatten().tolist():
                self.progress.refute(int(image[number]), points[number])

    def _doubt(self, images: Sequence[int], undecided: Sequence[str | None]) -> None:
        for image, reason in zip(images, undecided, strict=True):
            if reason is not None and self.progress.is_unfinished(image):
                (self.progress.reasons if self.leaf.ends_search else self.progress.doubts)[image] = reason

    def _give_up(self, images: set[int], reason: str) -> None:
        """Of images with open subproblems."""
        if images:
            still = set(self.open.image.tolist())
            for image in images & still:
                if self.progress.is_unfinished(image):
                    self.progress.reasons[image] = reason

    def _drop_finished(self) -> None:
        """Without the subproblems of images that are refuted or given up; what is left open of a goal bounds it."""
        if all(map(self.progress.is_unfinished, range(len(self.problem)))):
            return
        wanted = self.progress.unfinished(self.open.image)
        self._close(self.open.take(~wanted))
        self.open = self.open.take(wanted)

    def _close(
        self,
        subproblems: S,
        which: Tensor | None = None,
        bounded: B | None = None,
        solved: dict[int, Proof | None] | None = None,
    ) -> None:
        """The one place where subproblems end: by the proof of a positive bound, from the leaf solver or else from the
        bounder, or with their image, which is refuted or given up."""
        which = torch.ones_like(subproblems.image, dtype=torch.bool) if which is None else which
        place = subproblems.image[which] * self._closed.shape[1] + subproblems.goal[which]
        self._closed.view(-1).scatter_reduce_(0, place, subproblems.bound[which].to(self._closed), "amin")
        if self.record is None:
            return
        for number in which.nonzero().flatten().tolist():
            node, bound, proof = int(subproblems.node[number]), float(subproblems.bound[number]), None
            if bound > 0 and bounded is not None:
                proof = (solved or {}).get(number) or bounded.proof(number)
                self.record.close(node, bound, proof.reason, proof)
            else:
                refuted = self.progress.counterexamples[int(subproblems.image[number])] is not None
                self.record.close(node, bound, "counterexample" if refuted else "given up", None)


def in_turns(image: Tensor, bound: Tensor, most: int) -> Tensor:
    """Which of P subproblems come next: the worst-bounded ones of each image, images taking turns."""
    order = torch.argsort(bound, stable=True)
    order = order[torch.argsort(image[order], stable=True)]
    own = image[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(own, own)  # among the image's own
    return order[torch.argsort(rank, stable=True)[:most]]
