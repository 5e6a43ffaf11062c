"""Branch and bound: one search for all kinds of subproblems.

A subproblem is a part of one image's set, or the set under assumptions, with a lower bound of the quantity to be proved
positive there. Each round takes the open subproblems with the lowest bounds, of as few images as fill it, which take
turns, splits each into children that cover it, and bounds the children. Those with a positive bound are closed; the
others stay open until their image is refuted by a replayed counterexample or given up. An image is proved when all its
subproblems are closed by a proof.

Three parts depend on the kind of subproblem: a ``Bounder``, a ``Splitter`` and a ``LeafSolver``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bounds import Bounds, memory
from ..bounds.clock import OutOfTime, look, now, until
from ..bounds.network import Network
from ..typed import as_ints
from .chords import Chords
from .descent import points_at_a_time
from .image_progress import ImageProgress, Violates
from .problem import Problem
from .search_descent import SHARE, SearchDescents
from .search_record import Decision, Proof, SearchRecord
from .search_statistics import SearchStatistics, note, part


@dataclass(frozen=True)
class OpenSubproblems:
    """A table of P subproblems. Every field has P rows.

    Args:
        image: (P,) int64, position in the batch of each subproblem's image.
        goal: (P,) int64, which of its image's goals it bounds: a clause, or 0 where all clauses are bounded together.
        bound: (P,) lower bounds of the goals.
        node: (P,) int64, each subproblem's number in the search's record; -1 without a record.
    """

    image: Tensor
    goal: Tensor
    bound: Tensor
    node: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: Tensor) -> Self:
        """The subproblems selected by ``index``: numbers, or (P,) bool."""
        return type(self)(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def joined(self, other: Self) -> Self:
        """Both tables as one; where one's field has fewer columns, these are filled up with 0."""
        return type(self)(**{f.name: _joined(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    @property
    def bytes_each(self) -> int:
        """Bytes of one row, >= 1."""
        columns: list[Tensor] = [getattr(self, field.name) for field in fields(self)]
        return max(1, sum(column[0].numel() * column.element_size() for column in columns) if len(self) else 1)


S = TypeVar("S", bound=OpenSubproblems)
P = TypeVar("P", bound=OpenSubproblems)


@dataclass(frozen=True, eq=False)
class Bounded(ABC, Generic[S]):
    """Bounded subproblems; subclasses add results that their splitter and leaf solver continue from."""

    subproblems: S

    @abstractmethod
    def points(self, index: Tensor) -> Iterable[Tensor]:
        """Candidates for counterexamples in the subproblems ``index``: tensors (len(index), *shape) of points in the
        images' own sets, computed lazily."""

    def outputs(self, network: Network, index: Tensor, points: Tensor) -> Tensor:
        """(len(index), K) the folded network's outputs, up to rounding, at such points: only to choose what is
        replayed."""
        return network(points)

    def targets(self, index: Tensor) -> Tensor:
        """(len(index),) the clause that points in the subproblems ``index`` are to violate; their goals by default."""
        return self.subproblems.goal[index]

    @abstractmethod
    def proof(self, number: int) -> Proof:
        """The proof of the positive bound of subproblem ``number``. Called only for a search that is recorded."""


B = TypeVar("B", bound=Bounded[Any])


class Bounder(ABC, Generic[S, B]):
    """Computes lower bounds of batches of subproblems."""

    @property
    def evaluations(self) -> int:
        """Number of evaluations of the network, forward and backward, that a subproblem's bound costs at least."""
        return 1

    @property
    @abstractmethod
    def at_a_time(self) -> int:
        """Number of subproblems bounded together, >= 1."""

    def packed(self, subproblems: S) -> OpenSubproblems:
        """The subproblems without what can be computed again, for the open list when it outgrows its memory."""
        return subproblems

    def restored(self, packed: Any) -> S:
        """Subproblems from their packed form, with the parameters and bounds of their roots in place of their own."""
        return packed

    def prepare(self, subproblems: OpenSubproblems) -> None:
        """Called before subproblems, perhaps packed, are bounded ``at_a_time`` of them together: decisions made here do
        not depend on how many these are.

        Raises:
            OutOfTime: the clock ran out.
        """

    def release(self, open_: Tensor) -> None:
        """Called before each round with the images (P,) of the open subproblems: what is kept for others may go."""

    @abstractmethod
    def bound(self, subproblems: S) -> B:
        """Bound subproblems. No bound is lower than before; it is inf where nothing satisfies the assumptions.

        Raises:
            OutOfTime: the clock ran out before all were bounded.
        """


class Splitter(ABC, Generic[S, B]):
    """Chooses the decision by which each subproblem is split, and makes its children."""

    @property
    @abstractmethod
    def at_a_time(self) -> int:
        """Number of subproblems split in one round, >= 1."""

    @abstractmethod
    def options(self, bounded: B) -> Tensor:
        """(P, U) scores of the possible decisions, -inf for impossible ones. A subproblem without any is a leaf."""

    @abstractmethod
    def decide(self, bounded: B, options: Tensor, index: Tensor) -> S:
        """The subproblems ``index``, which all have an option, with their decision stored in them."""

    @abstractmethod
    def children(self, parents: S) -> S:
        """Subproblems that together cover the parents. Each keeps its parent's ``bound`` and ``node``."""

    @abstractmethod
    def decisions(self, children: S) -> Sequence[Decision]:
        """The decision of each child, for the record. Called only for a search that is recorded."""


@dataclass(frozen=True)
class SolverResult:
    """Results of a leaf solver for L subproblems.

    Args:
        bound: (L,) lower bounds; inf where nothing satisfies the assumptions, -inf where no bound was found.
        undecided: reasons why leaves stay unproved; None for a subproblem that is proved, refuted or no leaf.
        proofs: proofs of the positive bounds.
    """

    bound: Tensor
    undecided: Sequence[str | None]
    proofs: Sequence[Proof | None]


class LeafSolver(ABC, Generic[S, B]):
    """Solves leaves, which cannot be split further, and other subproblems where that is worth its time."""

    ends_search: bool
    """Whether an undecided leaf ends the search of its image. Otherwise the search continues: another subproblem may
    hold a counterexample."""

    probing: float = 0.0
    """Share of a round's subproblems that are probed before they are split; one a round at least, if not 0."""

    def wants(self, bounded: B) -> Tensor:
        """(P,) bool, the subproblems to solve besides leaves."""
        return torch.zeros_like(bounded.subproblems.image, dtype=torch.bool)

    @abstractmethod
    def solve(self, bounded: B, index: Tensor, leaf: Tensor, progress: ImageProgress) -> SolverResult:
        """Bound the subproblems ``index`` (L,) as tightly as possible, passing candidates for counterexamples to
        ``progress.refute``.

        Args:
            leaf: (L,) bool, which of them are leaves.
        Raises:
            OutOfTime: the clock ran out before all were solved.
        """

    def probe(self, one: S) -> Tensor | None:
        """A candidate (*shape) for a counterexample in one open subproblem that is about to be split; None without."""
        return None


@dataclass(frozen=True)
class SearchOutcome:
    """Results of a search for B images.

    Args:
        proved: (B,) bool, whether all goals of the image are proved.
        counterexamples: one replayed counterexample (*shape) per image, or None.
        lower: (B,) lower bounds of the worst margin.
        seconds: (B,) float64, each image's share of the search's time.
        reasons: why an image is neither proved nor refuted; None otherwise.
        statistics: counts and times of each image.
    """

    proved: Tensor
    counterexamples: list[Tensor | None]
    lower: Tensor
    seconds: Tensor
    reasons: list[str | None]
    statistics: list[SearchStatistics]


class BranchAndBound(Generic[S, B]):
    """Branch and bound that proves or refutes the goals of a batch of B problems.

    Args:
        network: the folded network, on which candidates are evaluated before they are replayed.
        known: (B, G) lower bounds of each image's goals before the search.
        roots: subproblems that cover every goal without a positive bound in ``known``, in the bounder's packed form.
        timeout: seconds for each image's share of the time. The batch as a whole has as many times ``timeout`` on the
            wall clock as it has images; the clock is checked within rounds, and an unfinished batch stays open.
        bounds: of the inputs of the network's activations over each problem's set, by position, for descents.
        most: number of splits after which an image is given up, exactly; None for no limit.
        record: receives the tree of subproblems, with the reason and the proof that closed each.
        descents: share of the evaluations of the network that bounding costs which descents may cost besides.
    """

    def __init__(
        self,
        problem: Problem,
        network: Network,
        known: Tensor,
        roots: OpenSubproblems,
        bounder: Bounder[S, B],
        splitter: Splitter[S, B],
        leaf: LeafSolver[S, B],
        *,
        timeout: float,
        violates: Violates,
        bounds: Mapping[int, Bounds],
        most: int | None = None,
        record: SearchRecord | None = None,
        descents: float = SHARE,
    ):
        self.problem, self.network, self.known = problem, network, known
        self.bounder, self.splitter, self.leaf = bounder, splitter, leaf
        self.most, self.record = most, record
        self.progress = ImageProgress(len(problem), timeout, violates, known.device)
        together = points_at_a_time(network, problem.specification, known)
        chords = Chords.of(network, known.dtype, bounds)
        self.descents = SearchDescents(problem, chords, descents, together)
        self.roots = roots.take(~(roots.bound > 0))
        self.open = OpenList(bounder, self.roots, memory.kept(known))
        self._closed = torch.where(known > 0, known, torch.inf)  # (B, G), least bound of each goal's closed subproblems

    def run(self) -> SearchOutcome:
        progress, count = self.progress, len(self.problem)
        try:
            with until(now() + progress.timeout * count):
                self._search()
        except OutOfTime:
            self._give_up(set(as_ints(self.open.image)), "wall clock")
            self._drop_finished()
        finally:
            statistics = progress.statistics()
            note(statistics)
        reasons = [reason or doubt for reason, doubt in zip(progress.reasons, progress.doubts, strict=True)]
        ends = zip(progress.counterexamples, reasons, strict=True)
        proved = torch.tensor([point is None and reason is None for point, reason in ends], dtype=torch.bool)
        lower = torch.maximum(self.known, self._closed).amin(-1)
        return SearchOutcome(proved, progress.counterexamples, lower, progress.seconds, reasons, statistics)

    def _search(self) -> None:
        self._examine(self._recorded(self.roots, root=True), self.bounder.restored, self.open.add_packed)
        self._descend()
        while len(self.open):
            look()
            self.bounder.release(self.open.image)
            chosen = in_turns(self.open.image, self.open.bound, self.splitter.at_a_time, self._shares())
            if self.leaf.probing and self._probe(self.open.take(chosen)):
                continue  # an image was refuted: choose again
            parents = self.open.take(chosen)
            self.open.remove(chosen)
            children = self.splitter.children(parents)
            self.progress.count_splits(parents.image, children.image)
            self._examine(self._recorded(children, root=False), lambda batch: batch, self.open.add)
            if self.most is not None:
                spent = {i for i in set(as_ints(parents.image)) if self.progress.splits[i] >= self.most}
                self._give_up(spent, f"{self.most} splits")
                self._drop_finished()
            self._descend()

    def _shares(self) -> Tensor:
        """(B,) the most subproblems of each image to be split next. Only the images with the fewest rounds so far take
        part, as many as have enough: many subproblems of few images are bounded faster (``reduced``)."""
        rounds, splits = (
            torch.tensor(counts, device=self.known.device) for counts in (self.progress.rounds, self.progress.splits)
        )
        each = torch.bincount(self.open.image, minlength=len(rounds))
        if self.most is not None:
            each = torch.minimum(each, self.most - splits)
        order = torch.argsort(rounds, stable=True)
        before = each[order].cumsum(0) - each[order]
        each[order[before >= self.splitter.at_a_time]] = 0
        return each

    def _descend(self) -> None:
        """Descend from the points of the worst subproblems of unfinished images, where that is due."""
        points = self.descents.points(self.progress.is_unfinished)
        if points is not None:
            with self.progress.charged(points.image, "attack"):
                self.descents.descend(points, self.progress.refute)
            self._drop_finished()

    def _recorded(self, subproblems: P, root: bool) -> P:
        """Add subproblems to the record, if there is one, and store their numbers in ``node``."""
        if self.record is None:
            return subproblems
        decisions = [None] * len(subproblems) if root else self.splitter.decisions(cast(S, subproblems))
        nodes = self.record.add(subproblems.node, subproblems.image, subproblems.goal, decisions)
        return replace(subproblems, node=nodes)

    def _probe(self, parents: S) -> bool:
        """Probe the first of the subproblems; return whether an image was refuted."""
        refuted, most = False, math.ceil(self.leaf.probing * len(parents))
        for number, image in enumerate(as_ints(parents.image[:most])):
            if self.progress.is_unfinished(image):
                one = torch.tensor([number], device=parents.image.device)
                with self.progress.charged(parents.image[one], "programs"):
                    point = self.leaf.probe(parents.take(one))
                    refuted = (point is not None and self.progress.refute(image, point)) or refuted
        self._drop_finished()
        return refuted

    def _examine(self, subproblems: P, whole: Callable[[P], S], keep: Callable[[P], object]) -> None:
        """Bound subproblems, then close them or keep them open with their decision.

        Args:
            whole: makes a batch of them whole; keep: receives those left when the clock runs out.
        """
        rest = torch.arange(len(subproblems), device=subproblems.image.device)
        try:
            if len(rest):
                with self.progress.charged(subproblems.image, "bounding"):
                    self.bounder.prepare(subproblems)
            for index in torch.split(rest, self.bounder.at_a_time) if len(rest) else ():
                batch = whole(subproblems.take(index))
                self._examine_batch(batch)
                rest = rest[len(index) :]
                images = set(as_ints(batch.image))
                self._give_up({i for i in images if self.progress.time_left(i) < 0}, "timeout")
                self._drop_finished()
        except OutOfTime:
            keep(subproblems.take(rest))
            raise

    def _examine_batch(self, batch: S) -> None:
        """Bound one batch, and solve its leaves. Nothing is closed or kept before all work is done, so that after
        ``OutOfTime`` the whole batch is still open."""
        progress, at_first = self.progress, batch
        wanted = progress.unfinished(batch.image)
        finished = at_first.take(~wanted)
        batch = batch.take(wanted)
        if not len(batch):
            self._close(finished)
            return
        with progress.charged(batch.image, "bounding"):
            bounded = self.bounder.bound(batch)
            open_ = ~(bounded.subproblems.bound > 0)
            self.descents.earn(batch.image, self.bounder.evaluations)
            with part("attack"):
                self._try(bounded, open_)
            none = open_.new_zeros(len(batch), 0).double()
            with part("branching"):
                options = self.splitter.options(bounded) if bool(open_.any()) else none
        leaf = open_ & ~(options > -torch.inf).any(1)
        asked = leaf | (open_ & self.leaf.wants(bounded))
        index = (asked & progress.unfinished(batch.image)).nonzero().flatten()
        solved = None
        subproblems: S = bounded.subproblems
        if len(index):
            with progress.charged(batch.image[index], "programs"):
                solved = self.leaf.solve(bounded, index, leaf[index], progress)
            bound = subproblems.bound.clone()
            bound[index] = torch.maximum(bound[index], solved.bound.to(bound))
            subproblems = replace(subproblems, bound=bound)
            bounded = replace(bounded, subproblems=subproblems)
        keep = ~(subproblems.bound > 0) & ~leaf & progress.unfinished(batch.image)
        kept, chosen = keep.nonzero().flatten(), None
        if len(kept):
            with progress.charged(batch.image[kept], "branching"):
                chosen = self.splitter.decide(bounded, options, kept)
        self._close(finished)
        self._close(subproblems, ~keep, bounded, dict(zip(as_ints(index), solved.proofs)) if solved else {})
        if chosen is not None:
            self.open.add(chosen)
        if solved is not None:
            self._doubt(as_ints(batch.image[index]), solved.undecided)

    def _try(self, bounded: B, open_: Tensor) -> None:
        """Try the points of the open subproblems' bounds as counterexamples, first on the folded network."""
        index = open_.nonzero().flatten()
        if not len(index):
            return
        image = bounded.subproblems.image[index]
        for points in bounded.points(index):
            outputs = bounded.outputs(self.network, index, points.to(self.known.dtype))
            margin = self.problem.specification.worst_at(image, outputs)
            self.descents.note(image, bounded.targets(index), bounded.subproblems.bound[index], points, margin)
            for number in as_ints((~(margin > 0)).nonzero()):
                self.progress.refute(int(image[number]), points[number])

    def _doubt(self, images: Sequence[int], undecided: Sequence[str | None]) -> None:
        for image, reason in zip(images, undecided, strict=True):
            if reason is not None and self.progress.is_unfinished(image):
                (self.progress.reasons if self.leaf.ends_search else self.progress.doubts)[image] = reason

    def _give_up(self, images: set[int], reason: str) -> None:
        """Give up those of ``images`` that have open subproblems and are unfinished."""
        if images:
            still = set(as_ints(self.open.image))
            for image in images & still:
                if self.progress.is_unfinished(image):
                    self.progress.reasons[image] = reason

    def _drop_finished(self) -> None:
        """Close the open subproblems of images that are refuted or given up; their bounds count for the goals."""
        if all(map(self.progress.is_unfinished, range(len(self.problem)))):
            return
        for closed in self.open.remove(~self.progress.unfinished(self.open.image)):
            self._close(closed)

    def _close(
        self,
        subproblems: OpenSubproblems,
        which: Tensor | None = None,
        bounded: B | None = None,
        solved: dict[int, Proof | None] | None = None,
    ) -> None:
        """Close the subproblems ``which`` (P,) bool, all by default; the only place where subproblems are closed.

        The reason is a positive bound, with its proof from the leaf solver (``solved``, by number) or else from
        ``bounded``; or an image that is refuted or given up.
        """
        which = torch.ones_like(subproblems.image, dtype=torch.bool) if which is None else which
        place = subproblems.image[which] * self._closed.shape[1] + subproblems.goal[which]
        self._closed.view(-1).scatter_reduce_(0, place, subproblems.bound[which].to(self._closed), "amin")
        if bounded is not None:
            proved = which & (subproblems.bound > 0)
            self.progress.closed.index_add_(0, subproblems.image, proved.to(torch.int64))
        if self.record is None:
            return
        for number in as_ints(which.nonzero()):
            node, bound, proof = int(subproblems.node[number]), float(subproblems.bound[number]), None
            if bound > 0 and bounded is not None:
                proof = (solved or {}).get(number) or bounded.proof(number)
                self.record.close(node, bound, proof.reason, proof)
            else:
                refuted = self.progress.counterexamples[int(subproblems.image[number])] is not None
                self.record.close(node, bound, "counterexample" if refuted else "given up", None)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    if first.ndim == 2 and first.shape[1] != second.shape[1]:
        most = max(first.shape[1], second.shape[1])
        first, second = (F.pad(part, (0, most - part.shape[1])) for part in (first, second))
    return torch.cat([first, second])


class OpenList(Generic[S]):
    """The open subproblems of a search. Those with the lowest bounds are whole, as far as memory allows; the others are
    packed, so that the search goes on in bounded memory. Numbers count the whole ones first.

    Args:
        roots: subproblems in packed form, which gives the type; none of them is in the list.
        most: bytes for whole subproblems.
    """

    def __init__(self, bounder: Bounder[S, Any], roots: OpenSubproblems, most: int):
        self.bounder, self.most = bounder, most
        self.packed = roots.take(roots.image[:0])
        self.whole = bounder.restored(self.packed)

    def __len__(self) -> int:
        return len(self.whole) + len(self.packed)

    @property
    def image(self) -> Tensor:
        return torch.cat([self.whole.image, self.packed.image])

    @property
    def bound(self) -> Tensor:
        return torch.cat([self.whole.bound, self.packed.bound])

    def add(self, subproblems: S) -> None:
        self.whole = self.whole.joined(subproblems)
        most = max(1, self.most // self.whole.bytes_each)
        if len(self.whole) > most:  # half of the room is left free: packing copies the list
            order = torch.argsort(self.whole.bound, stable=True)
            keep, pack = order[: (most + 1) // 2].sort().values, order[(most + 1) // 2 :].sort().values
            self.add_packed(self.bounder.packed(self.whole.take(pack)))
            self.whole = self.whole.take(keep)

    def add_packed(self, packed: OpenSubproblems) -> None:
        self.packed = self.packed.joined(packed)

    def take(self, index: Tensor) -> S:
        """The subproblems of the numbers ``index``, in its order; packed ones are restored."""
        first = len(self.whole)
        if not bool((index >= first).any()):
            return self.whole.take(index)
        whole = index < first
        order = torch.argsort(torch.argsort((~whole).to(torch.uint8), stable=True), stable=True)
        restored = self.bounder.restored(self.packed.take(index[~whole] - first))
        return self.whole.take(index[whole]).joined(restored).take(order)

    def remove(self, which: Tensor) -> tuple[OpenSubproblems, OpenSubproblems]:
        """Remove subproblems, given their numbers or (P,) bool; return the whole and the packed ones among them."""
        left = torch.ones(len(self), dtype=torch.bool, device=which.device)
        left[which] = False
        whole, packed = left[: len(self.whole)], left[len(self.whole) :]
        removed = self.whole.take(~whole), self.packed.take(~packed)
        self.whole, self.packed = self.whole.take(whole), self.packed.take(packed)
        return removed


def in_turns(image: Tensor, bound: Tensor, most: int, each: Tensor) -> Tensor:
    """The numbers of the next ``most`` of P subproblems, of each image (B,) ``each`` at most: those with the lowest
    bounds, images taking turns."""
    order = torch.argsort(bound, stable=True)
    order = order[torch.argsort(image[order], stable=True)]
    own = image[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(own, own)  # within its image
    order, rank = order[rank < each[own]], rank[rank < each[own]]
    return order[torch.argsort(rank, stable=True)[:most]]
