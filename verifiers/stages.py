"""The stages of the cascade."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from ..attacks import Attack, default_attack
from ..bounds import Bounds, PerturbationSet, Region, SparseBall, compute_rows, forward, memory
from ..bounds.clock import OutOfTime, expected, look, until
from ..bounds.crown import bound_forms, crown_bounds, interval_bounds, interval_forms, rows_at_a_time
from ..bounds.effort import work_of
from ..bounds.folding import fold
from ..bounds.forward_linear import forward_bounds
from ..bounds.network import Network
from ..errors import InputError, check
from ..noise import Noise
from ..step import Batch, Step
from ..typed import as_ints
from .bounds_so_far import BoundsSoFar
from .branching import minimiser
from .engine import SearchOutcome
from .input_split import BATCH, INPUTS, few_inputs, split_inputs
from .neuron_split import split_neurons
from .neurons import Neurons
from .optimise import BestParameters, Subproblems, ascents_at_a_time, maximise, starting_slopes, with_offsets
from .problem import Problem, Specification, Status
from .search import Search
from .search_record import SearchRecord
from .sparse_split import split_locations
from .stage import Finding, Judge, Stage, TimedStage, holds, proof, undecided, where_true

if TYPE_CHECKING:
    from .settings import Certify


@dataclass(frozen=True)
class CleanStage(Stage):
    """Marks images that are misclassified without perturbation; a tie is wrong."""

    name: ClassVar[str] = "clean"
    traces: ClassVar[bool] = False

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        wrong = ~holds(problem.specification, forward(problem.network, problem.region.images).logits)
        return Finding(where_true(wrong, "misclassified"), known, counterexamples=list(problem.region.images))


@dataclass(frozen=True)
class AttackStage(Stage):
    """Falsifies by an attack; each candidate is replayed in a batch of one.

    Args:
        attack: None for the set's default attack.
    """

    name: ClassVar[str] = "attack"
    traces: ClassVar[bool] = False
    attack: Attack | None = None
    seed: int = 0
    judge: Judge = field(default_factory=Judge)

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        return cls(settings.attack)

    def prepared(self, seed: int, judge: Judge) -> Self:
        return replace(self, seed=seed, judge=judge)

    def attack_over(self, ball: PerturbationSet) -> Attack:
        return self.attack or default_attack(ball, "falsify")

    def check_ball(self, ball: PerturbationSet, where: str = "certify") -> None:
        self.attack_over(ball).check_ball(ball, f"{where}.attack")

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        labels = problem.specification.labels
        if labels is None:
            raise InputError("specification: found no labels; accepted for the stage attack: one with labels")
        noise = Noise(self.seed, problem.index)
        batch = Batch(problem.region.images, labels, problem.index)
        ball = problem.region.perturbation(PerturbationSet)
        if ball is None:
            raise InputError(
                f"region: found a {problem.region.kind}; accepted for the stage attack: a perturbation set around "
                "images (the stage falsify searches any region)"
            )
        attack = self.attack_over(ball)
        network = _WrongPointKeeper(problem) if attack.attack_mode == "eval" else problem.network
        try:
            candidates = attack(network, batch, ball, Step.evaluation(ball, noise)).images
        except OutOfTime:
            if not isinstance(network, _WrongPointKeeper):
                raise
            candidates = network.wrong
        wrong = ~holds(problem.specification, forward(problem.network, candidates).logits)
        for number in as_ints(wrong.nonzero()):
            wrong[number] = self.judge(problem, number, candidates[number])
        return Finding(where_true(wrong, "falsified"), known, counterexamples=list(candidates))


class _WrongPointKeeper(nn.Module):
    """A problem's network that checks the clock before each run and keeps, as ``wrong``, each image's first point on
    which it was wrong; the image itself where there was none."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.network, self.specification = problem.network, problem.specification
        self.wrong, self.kept = problem.region.images, torch.zeros_like(problem.index, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        look()
        logits = self.network(x)
        if x.shape == self.wrong.shape:  # the whole batch
            new = ~(self.kept | holds(self.specification, logits.detach()))
            self.wrong = torch.where(new.reshape(-1, *[1] * (x.ndim - 1)), x.detach(), self.wrong)
            self.kept = self.kept | new
        return logits


@dataclass(frozen=True)
class IbpStage(Stage):
    """Verifies by interval bounds, with the specification merged into the last layer."""

    name: ClassVar[str] = "ibp"

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        forms, offsets = known.forms_of(problem.specification)
        if known.network.rounding is None:  # the layers' fused kernels are 1.6 times as fast
            rows = compute_rows(problem.network, problem.region, forms)
        else:
            rows = interval_forms(known.network, known.region_of(problem), forms)
        return proof(problem, known.with_rows(with_offsets(known.network, rows, offsets)))


def _with_bounds(problem: Problem, known: BoundsSoFar, refine: bool = True) -> BoundsSoFar:
    """Add bounds of the activations' inputs, by linear bounds (``refine``) or intervals. The expected time of the pass
    that uses them is kept back from the clock."""
    network, numbers = known.network, problem.specification.offsets.numel()
    work = work_of(network, len(network.operations) - 1, lambda number: numbers * network.shapes[number].numel())
    region = known.region_of(problem)
    with until(keep=expected(work)):
        if not refine:
            return known.with_bounds(interval_bounds(network, region))
        closer = few_inputs(problem) and network.rounding is None  # forward bounds do not cover rounding
        return known.with_bounds(crown_bounds(network, region, _by_forward_lines(network, region) if closer else None))


def _by_forward_lines(network: Network, region: Region) -> dict[int, Bounds]:
    """Forward bounds over boxes in which few inputs vary, as many boxes at a time as fit into memory.

    Backward passes that start from them are fewer and tighter: intervals forget that all outputs of a layer depend on
    the same few inputs.
    """
    columns = int((region.hull.radius > 0).flatten(1).any(0).sum())  # one for each input that varies in any box
    size = rows_at_a_time(network, 1 + max(INPUTS, columns), region.hull.center)
    every = torch.arange(len(region.hull.center), device=region.hull.center.device)
    parts = [forward_bounds(network, region.take(part)) for part in torch.split(every, size)]
    ends = {place: [(part[place].lower, part[place].upper) for part in parts] for place in parts[0]}
    return {place: Bounds(*map(torch.cat, zip(*own, strict=True))) for place, own in ends.items()}


@dataclass(frozen=True)
class CrownStage(Stage):
    """Verifies by CROWN.

    Args:
        refine: whether the activations' inputs are bounded by linear bounds too (CROWN), or by intervals (CROWN-IBP).
    """

    name: ClassVar[str] = "crown"
    refine: bool = True

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        known = _with_bounds(problem, known, refine=self.refine)
        region, network = known.region_of(problem), known.network
        forms, offsets = known.forms_of(problem.specification)
        rows: list[Tensor] = []
        for part in forms.split(rows_at_a_time(network, len(problem), offsets)):
            try:
                rows.append(bound_forms(network, region, part.dense(), known.bounds))
            except OutOfTime:
                rows.append(offsets.new_full(part.shape[:2], -torch.inf))
        return proof(problem, known.with_rows(with_offsets(network, torch.cat(rows, 1), offsets)))


@dataclass(frozen=True)
class CrownIbpStage(CrownStage):
    """Verifies by CROWN-IBP: linear bounds, with the activations' inputs bounded by intervals."""

    name: ClassVar[str] = "crown_ibp"
    refine: bool = False


@dataclass(frozen=True)
class AlphaStage(Stage):
    """Verifies by linear bounds with optimised slopes (alpha-CROWN), separate ones for each row of the specification;
    falsifies by the bounds' minimisers.

    Args:
        steps, rate: steps and learning rate of the ascent on slopes.
    """

    name: ClassVar[str] = "alpha"
    steps: int = 20
    rate: float = 0.1
    judge: Judge = field(default_factory=Judge)

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        return cls(settings.alpha_steps)

    def prepared(self, seed: int, judge: Judge) -> Self:
        return replace(self, judge=judge)

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        known = known if known.bounds else _with_bounds(problem, known)
        network, count = known.network, problem.specification.offsets.shape[1]
        neurons, best = Neurons.of(network), torch.full_like(known.rows, -torch.inf)
        size, groups = self._sizes(problem, known)
        numbers = len(problem) * count * sum(neurons.sizes)
        keeping = 2 * numbers * best.element_size() <= memory.kept(best)  # else the search starts from CROWN's slopes
        slopes = best.new_empty(*best.shape, sum(neurons.sizes)) if keeping else None
        counterexamples: list[Tensor | None] = [None] * len(problem)
        for part in torch.split(torch.arange(len(problem), device=problem.index.device), size):
            own, some = known.subset(part), problem.subset(part)
            lower, upper = neurons.ends(own.bounds, own.rows)
            region = own.region_of(some)
            for group in groups:
                at, rows = (part[:, None], group), some.specification.part(group)
                sub = Subproblems(region, *own.rows_of(rows), lower, upper)
                alphas = starting_slopes(lower, upper, len(group))
                if slopes is not None:
                    slopes[at] = alphas
                if len(groups) > 1 and bool((rows.worst(own.rows[:, group]) > 0).all()):
                    continue
                kept = None if known.record is None else BestParameters()
                try:
                    optimised = maximise(
                        network, sub, alphas, steps=self.steps, rate=self.rate,
                        done=partial(_proves, rows), kept=kept,
                    )  # fmt: skip
                except OutOfTime:
                    continue
                best[at] = optimised.best
                if slopes is not None:
                    slopes[at] = optimised.alphas if kept is None or kept.alphas is None else kept.alphas
                point = some.region.nearest(minimiser(optimised, region, optimised.best.argmin(1)))
                fails = ~holds(some.specification, network(point.to(best.dtype)))
                wrong = fails & ~(rows.worst(optimised.best) > 0)
                for number in as_ints(wrong.nonzero()):
                    if self.judge(some, number, point[number]):
                        counterexamples[int(part[number])] = point[number]
        known = replace(known, alphas=slopes).with_rows(best)
        proved = proof(problem, known)
        statuses: list[Status | None] = [
            "falsified" if point is not None else status
            for point, status in zip(counterexamples, proved.statuses, strict=True)
        ]
        return Finding(statuses, known, counterexamples=counterexamples)

    def _sizes(self, problem: Problem, known: BoundsSoFar) -> tuple[int, list[Tensor]]:
        """(images, groups): the number of images, and the groups of rows, that are optimised together. Only where one
        image's rows are too many are there several groups, each of whole clauses."""
        specification = problem.specification
        count = specification.offsets.shape[1]
        size = ascents_at_a_time(known.network, count, known.rows)
        if size:
            return size, [torch.arange(count, device=known.rows.device)]
        groups, most = list[list[int]](), ascents_at_a_time(known.network, 1, known.rows)
        for clause in range(int(specification.clauses.max()) + 1):
            rows = as_ints((specification.clauses == clause).nonzero())
            if groups and len(groups[-1]) + len(rows) <= most:
                groups[-1] += rows
            elif rows:
                groups.append(rows)
        return 1, [torch.tensor(group, device=known.rows.device) for group in groups]


@dataclass(frozen=True)
class BabStage(TimedStage):
    """Verifies or falsifies by branch and bound on ReLUs and LeakyReLUs, over boxes: complete, up to its tolerance, for
    networks without other non-linear functions. These stay relaxed, and may leave an image undecided.

    Args:
        timeout: seconds for an image.
    """

    name: ClassVar[str] = "bab"
    search: Search = field(default_factory=Search)
    timeout: float = 60.0
    judge: Judge = field(default_factory=Judge)

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        return cls(settings.search, settings.timeout)

    def fitting(self, problem: Problem) -> Stage:
        """Over a sparse set the ``LocationStage`` with the same fields."""
        sparse = problem.region.perturbation(SparseBall)
        return self if sparse is None else LocationStage(self.search, self.timeout, self.judge)

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        splits = known.network.piecewise_linear or known.network.has_kinks
        if not splits or not problem.region.is_box:
            operations = map(known.network.nonlinear_at, known.network.nonlinear)
            others = sorted({operation.path for operation in operations if not operation.piecewise_linear})
            found = f", not {', '.join(others[:3])}" if others and not splits else ""
            return undecided(problem, known, f"branch and bound splits ReLUs and LeakyReLUs, over boxes{found}")
        known = known if known.bounds else _with_bounds(problem, known)
        careful = known.network.rounding is not None
        exact = fold(problem.network, problem.region.images.shape[1:], dtype=torch.float64, as_written=careful)
        search, record = self.search, None
        if known.record is not None:
            search, record = replace(search, tighten=False), SearchRecord()  # what it bounds anew is in no record
        outcome = split_neurons(
            problem, known, exact, search, self.timeout,
            lambda number, image: self.judge(problem, number, image), record,
        )  # fmt: skip
        return _finding_of_search(replace(known, record=record), outcome)


@dataclass(frozen=True)
class InputSplitStage(TimedStage):
    """Verifies or falsifies by halving the input box, for networks of few inputs and any activations.

    Args:
        timeout: seconds for an image.
        batch: most boxes halved in one round.
    """

    name: ClassVar[str] = "input_split"
    timeout: float = 60.0
    judge: Judge = field(default_factory=Judge)
    batch: int = BATCH

    def __post_init__(self) -> None:
        check(self.batch >= 1, "batch", self.batch, "a whole number >= 1")

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        return cls(settings.timeout)

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        if not few_inputs(problem):
            return undecided(problem, known, f"splitting inputs takes boxes of {INPUTS} inputs that vary, at most")
        record = None if known.record is None else SearchRecord()
        outcome = split_inputs(
            problem, known, self.timeout, lambda number, image: self.judge(problem, number, image), self.batch, record
        )
        return _finding_of_search(replace(known, record=record), outcome)


@dataclass(frozen=True)
class LocationStage(TimedStage):
    """Verifies or falsifies over a sparse set by branch and bound on the units that change.

    Args:
        search: settings of branch and bound on neurons, for its leaves.
        timeout: seconds for an image.
    """

    name: ClassVar[str] = "location"
    search: Search = field(default_factory=Search)
    timeout: float = 60.0
    judge: Judge = field(default_factory=Judge)

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        return cls(settings.search, settings.timeout)

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        if problem.region.perturbation(SparseBall) is None or known.network.rounding is not None:
            why = "splitting locations takes sparse sets (SparseBall), in nearest arithmetic"
            return undecided(problem, known, why)
        outcome = split_locations(
            problem, known, self.search, self.timeout, lambda number, image: self.judge(problem, number, image)
        )
        return _finding_of_search(known, outcome)


def _proves(specification: Specification, lower: Tensor) -> Tensor:
    """(B,) bool, whether lower bounds (B, R) of the rows prove the specification."""
    return specification.worst(lower) > 0


def _finding_of_search(known: BoundsSoFar, outcome: SearchOutcome) -> Finding:
    statuses: list[Status | None] = []
    for number, reason in enumerate(outcome.reasons):
        late = reason in ("timeout", "wall clock")
        refuted = outcome.counterexamples[number] is not None
        proved = bool(outcome.proved[number])
        statuses.append("falsified" if refuted else "verified" if proved else "timeout" if late else None)
    return Finding(
        statuses, known, outcome.lower, outcome.counterexamples, outcome.seconds, outcome.reasons, outcome.statistics
    )
