"""The stages of the cascade: each looks at the problems that the earlier ones left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..attacks import Attack, Pgd, customary
from ..bounds import compute_rows, forward
from ..bounds.crown import bound_forms, crown_bounds, interval_bounds, interval_forms, rows_at_a_time
from ..bounds.folding import fold
from ..noise import Noise
from ..step import Batch, Step
from .bab import branch_and_bound
from .branching import minimiser
from .input_split import INPUTS, few_inputs, split_inputs
from .known import Known
from .optimise import Neurons, Subproblems, maximise, starting_slopes, with_offsets
from .problem import Problem, Specification, Status
from .search import Outcome, Search
from .sparse_split import sparse_ball, split_locations

PGD = Pgd(steps=40, step_size=0.1, restarts=5, diversified=2, objective="margin")
Replay = Callable[[Tensor], Tensor]
"""Logits (R, K) of one image in each of R runs, in all of which a counterexample has to stand."""


@dataclass(frozen=True)
class Finding:
    """What a stage found for a batch of B problems.

    Args:
        statuses: of each problem, None where it stays open.
        known: what the next stage may build on, with this stage's lower bounds.
        lower: (B,) of the worst margin, where the stage bounds more than rows.
        counterexamples: of the problems that it decided by one.
        seconds: each problem's, where the stage knows better than equal shares.
        reasons: why a problem stays open, where there is something to say.
    """

    statuses: Sequence[Status | None]
    known: Known
    lower: Tensor | None = None
    counterexamples: Sequence[Tensor | None] | None = None
    seconds: Tensor | None = None
    reasons: Sequence[str | None] | None = None


class Stage(Protocol):
    name: str

    def __call__(self, problem: Problem, known: Known) -> Finding: ...


def _where(decided: Tensor, status: Status) -> list[Status | None]:
    return [status if done else None for done in decided.tolist()]


def proof(problem: Problem, known: Known) -> Finding:
    """What the rows' lower bounds prove."""
    return Finding(_where(problem.specification.worst(known.rows) > 0, "verified"), known)


@dataclass(frozen=True)
class Judge:
    """Whether an input is a counterexample: in the set, and wrong when it is run alone. A tie is wrong.

    Args:
        replay: other runs of the network, such as onnxruntime's; all of them have to be wrong.
    """

    replay: Replay | None = None

    def __call__(self, problem: Problem, number: int, image: Tensor) -> bool:
        at = torch.tensor([number], device=problem.index.device)
        one = problem.subset(at)
        if not bool(one.region.contains(image[None])[0]):
            return False
        runs = [forward(problem.network, image[None]).logits]
        runs += self.replay(image).to(image.device).split(1) if self.replay else []
        return not any(bool(holds(one.specification, logits)[0]) for logits in runs)


def holds(specification: Specification, logits: Tensor) -> Tensor:
    """(B,), written so that NaN does not hold."""
    return specification.worst(specification.values(logits)) > 0


@dataclass(frozen=True)
class CleanStage:
    """The image itself must be right; a tie is wrong."""

    name: str = "clean"

    def __call__(self, problem: Problem, known: Known) -> Finding:
        wrong = ~holds(problem.specification, forward(problem.network, problem.region.images).logits)
        return Finding(_where(wrong, "misclassified"), known, counterexamples=list(problem.region.images))


@dataclass(frozen=True)
class AttackStage:
    """Falsifies by attack. A candidate counts only when it is replayed, one image at a time."""

    attack: Attack = PGD
    seed: int = 0
    judge: Judge = field(default_factory=Judge)
    name: str = "attack"

    def __call__(self, problem: Problem, known: Known) -> Finding:
        labels = problem.specification.labels
        if labels is None:
            raise ValueError("specification: found no labels; accepted: a robustness specification for this stage")
        noise = Noise(self.seed, problem.index)
        batch = Batch(problem.region.images, labels, problem.index)
        ball = problem.region.ball
        attack = customary(self.attack, PGD, ball, 300)
        candidates = attack(problem.network, batch, ball, Step.evaluation(ball, noise)).images
        wrong = ~holds(problem.specification, forward(problem.network, candidates).logits)
        for number in wrong.nonzero().flatten().tolist():
            wrong[number] = self.judge(problem, number, candidates[number])
        return Finding(_where(wrong, "falsified"), known, counterexamples=list(candidates))


@dataclass(frozen=True)
class IbpStage:
    """Verifies by interval bounds, the specification merged into the last layer."""

    name: str = "ibp"

    def __call__(self, problem: Problem, known: Known) -> Finding:
        forms, offsets = known.rows_of(problem.specification)
        if known.network.rounding is None:  # with the layers' own fused kernels: 1.6 times as fast
            rows = compute_rows(problem.network, problem.region, forms)
        else:
            rows = interval_forms(known.network, known.region_of(problem), forms)
        return proof(problem, known.with_rows(with_offsets(known.network, rows, offsets)))


@dataclass(frozen=True)
class CrownStage:
    """Verifies by linear bounds: their activations' inputs bounded by intervals (CROWN-IBP), or by linear bounds in
    turn (CROWN)."""

    name: str = "crown"
    refine: bool = True

    def __call__(self, problem: Problem, known: Known) -> Finding:
        region = known.region_of(problem)
        known = known.with_bounds((crown_bounds if self.refine else interval_bounds)(known.network, region))
        forms, offsets = known.rows_of(problem.specification)
        size = rows_at_a_time(known.network, len(problem), forms)
        rows = torch.cat([bound_forms(known.network, region, part, known.bounds) for part in forms.split(size, 1)], 1)
        return proof(problem, known.with_rows(with_offsets(known.network, rows, offsets)))


@dataclass(frozen=True)
class AlphaStage:
    """Verifies by linear bounds with optimised slopes, each row of the specification with its own."""

    steps: int = 20
    rate: float = 0.1
    judge: Judge = field(default_factory=Judge)
    name: str = "alpha"

    def __call__(self, problem: Problem, known: Known) -> Finding:
        neurons, specification = Neurons.of(known.network), problem.specification
        if not known.bounds:
            known = known.with_bounds(crown_bounds(known.network, known.region_of(problem)))
        rows, slopes = [], []
        counterexamples: list[Tensor | None] = [None] * len(problem)
        size = rows_at_a_time(known.network, specification.rows.shape[1], known.rows) // 4 or 1
        for part in torch.arange(len(problem), device=problem.index.device).split(size):
            some, facts = problem.subset(part), known.subset(part)
            lower, upper = neurons.ends(facts.bounds, facts.rows)
            region = facts.region_of(some)
            sub = Subproblems(region, *facts.rows_of(some.specification), lower, upper)
            worst = some.specification.worst
            found = maximise(
                known.network, sub, starting_slopes(lower, upper, sub.forms.shape[1]), steps=self.steps, rate=self.rate,
                done=lambda best, worst=worst: worst(best) > 0,
            )  # fmt: skip
            rows.append(found.best)
            slopes.append(found.alphas)
            point = some.region.nearest(minimiser(found, region, found.best.argmin(1)))
            wrong = ~holds(some.specification, known.network(point.to(known.rows.dtype))) & ~(worst(found.best) > 0)
            for number in wrong.nonzero().flatten().tolist():
                if self.judge(some, number, point[number]):
                    counterexamples[int(part[number])] = point[number]
        known = Known(known.network, known.rows, known.bounds, torch.cat(slopes)).with_rows(torch.cat(rows))
        proved = proof(problem, known)
        statuses = [
            "falsified" if found is not None else status
            for found, status in zip(counterexamples, proved.statuses, strict=True)
        ]
        return Finding(statuses, known, counterexamples=counterexamples)


@dataclass(frozen=True)
class BabStage:
    """Verifies or falsifies by branch and bound: complete for networks of ReLUs and LeakyReLUs, up to its tolerance."""

    search: Search = field(default_factory=Search)
    timeout: float = 60.0
    judge: Judge = field(default_factory=Judge)
    name: str = "bab"

    def __call__(self, problem: Problem, known: Known) -> Finding:
        if not known.network.piecewise_linear or not problem.region.is_box:
            why = "branch and bound takes ReLU and LeakyReLU networks over boxes"
            return Finding([None] * len(problem), known, reasons=[why] * len(problem))
        if not known.bounds:
            known = known.with_bounds(crown_bounds(known.network, known.region_of(problem)))
        careful = known.network.rounding is not None
        exact = fold(problem.network, problem.region.images.shape[1:], dtype=torch.float64, as_written=careful)
        found = branch_and_bound(
            problem, known, exact, self.search, self.timeout,
            lambda number, image: self.judge(problem, number, image),
        )  # fmt: skip
        return _searched(known, found)


@dataclass(frozen=True)
class InputSplitStage:
    """Verifies or falsifies by halving the input box: for few inputs, whatever the activations."""

    timeout: float = 60.0
    judge: Judge = field(default_factory=Judge)
    name: str = "input_split"

    def __call__(self, problem: Problem, known: Known) -> Finding:
        if not few_inputs(problem):
            why = f"splitting inputs takes boxes of {INPUTS} inputs that vary, at most"
            return Finding([None] * len(problem), known, reasons=[why] * len(problem))
        found = split_inputs(problem, known, self.timeout, lambda number, image: self.judge(problem, number, image))
        return _searched(known, found)


@dataclass(frozen=True)
class LocationStage:
    """Verifies or falsifies over a sparse set by branch and bound on which units change."""

    search: Search = field(default_factory=Search)
    timeout: float = 60.0
    judge: Judge = field(default_factory=Judge)
    name: str = "location"

    def __call__(self, problem: Problem, known: Known) -> Finding:
        if sparse_ball(problem) is None or known.network.rounding is not None:
            why = "splitting locations takes sparse sets (SparseBall), in nearest arithmetic"
            return Finding([None] * len(problem), known, reasons=[why] * len(problem))
        found = split_locations(
            problem, known, self.search, self.timeout, lambda number, image: self.judge(problem, number, image)
        )
        return _searched(known, found)


def _searched(known: Known, found: Outcome) -> Finding:
    statuses: list[Status | None] = []
    for number, reason in enumerate(found.reasons):
        late = reason in ("timeout", "wall clock")
        refuted = found.counterexamples[number] is not None
        proved = bool(found.proved[number])
        statuses.append("falsified" if refuted else "verified" if proved else "timeout" if late else None)
    return Finding(statuses, known, found.lower, found.counterexamples, found.seconds, found.reasons)
