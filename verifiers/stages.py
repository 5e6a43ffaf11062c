"""The stages of the cascade: each looks at the problems that the earlier ones left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ..attacks import Attack, Pgd, customary
from ..bounds import compute_rows, forward
from ..bounds.clock import OutOfTime, expected, look, until
from ..bounds.crown import bound_forms, crown_bounds, interval_bounds, interval_forms, rows_at_a_time
from ..bounds.effort import work_of
from ..bounds.folding import fold
from ..bounds.region import Around
from ..errors import InputError
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
    """Looks at the clock (``bounds.clock``) between the pieces of its work. Out of time it finds what it knows by then,
    or raises ``OutOfTime``."""

    @property
    def name(self) -> str: ...

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
            raise InputError("specification: found no labels; accepted: a robustness specification for this stage")
        noise = Noise(self.seed, problem.index)
        batch = Batch(problem.region.images, labels, problem.index)
        if not isinstance(problem.region, Around):
            found = problem.region.kind
            raise InputError(f"region: found {found}; accepted: a perturbation set around each image for this stage")
        ball = problem.region.ball
        attack = customary(self.attack, PGD, ball, 300)
        network = _Watched(problem) if attack.attack_mode == "eval" else problem.network
        try:
            candidates = attack(network, batch, ball, Step.evaluation(ball, noise)).images
        except OutOfTime:
            if not isinstance(network, _Watched):
                raise
            candidates = network.wrong
        wrong = ~holds(problem.specification, forward(problem.network, candidates).logits)
        for number in wrong.nonzero().flatten().tolist():
            wrong[number] = self.judge(problem, number, candidates[number])
        return Finding(_where(wrong, "falsified"), known, counterexamples=list(candidates))


class _Watched(nn.Module):
    """A problem's network, which looks at the clock before each run, and keeps of each image the first point that is
    ``wrong``; the image itself where none was."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.network, self.specification = problem.network, problem.specification
        self.wrong, self.found = problem.region.images, torch.zeros_like(problem.index, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        look()
        logits = self.network(x)
        if x.shape == self.wrong.shape:  # the whole batch
            new = ~(self.found | holds(self.specification, logits.detach()))
            self.wrong = torch.where(new.reshape(-1, *[1] * (x.ndim - 1)), x.detach(), self.wrong)
            self.found = self.found | new
        return logits


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


def _bounded(problem: Problem, known: Known, refine: bool = True) -> Known:
    """With bounds of the activations' inputs, by linear bounds or by intervals. They are of use only with a pass that
    takes them: it is left the time that it is expected to take."""
    network, numbers = known.network, problem.specification.rows.shape[:2].numel()
    work = work_of(network, len(network.operations) - 1, lambda number: numbers * network.shapes[number].numel())
    with until(keep=expected(work)):
        return known.with_bounds((crown_bounds if refine else interval_bounds)(network, known.region_of(problem)))


@dataclass(frozen=True)
class CrownStage:
    """Verifies by linear bounds: their activations' inputs bounded by intervals (CROWN-IBP), or by linear bounds in
    turn (CROWN)."""

    name: str = "crown"
    refine: bool = True

    def __call__(self, problem: Problem, known: Known) -> Finding:
        known = _bounded(problem, known, refine=self.refine)
        region, network = known.region_of(problem), known.network
        forms, offsets = known.rows_of(problem.specification)
        rows = []
        for part in forms.split(rows_at_a_time(network, len(problem), forms), 1):
            try:
                rows.append(bound_forms(network, region, part, known.bounds))
            except OutOfTime:
                rows.append(torch.full_like(part[..., 0], -torch.inf))
        return proof(problem, known.with_rows(with_offsets(network, torch.cat(rows, 1), offsets)))


@dataclass(frozen=True)
class AlphaStage:
    """Verifies by linear bounds with optimised slopes, each row of the specification with its own."""

    steps: int = 20
    rate: float = 0.1
    judge: Judge = field(default_factory=Judge)
    name: str = "alpha"

    def __call__(self, problem: Problem, known: Known) -> Finding:
        neurons, specification = Neurons.of(known.network), problem.specification
        known = known if known.bounds else _bounded(problem, known)
        rows, slopes = [], []
        counterexamples: list[Tensor | None] = [None] * len(problem)
        size = rows_at_a_time(known.network, specification.rows.shape[1], known.rows) // 4 or 1
        for part in torch.arange(len(problem), device=problem.index.device).split(size):
            some, facts = problem.subset(part), known.subset(part)
            lower, upper = neurons.ends(facts.bounds, facts.rows)
            region = facts.region_of(some)
            sub = Subproblems(region, *facts.rows_of(some.specification), lower, upper)
            worst = some.specification.worst
            slopes.append(starting_slopes(lower, upper, sub.forms.shape[1]))
            try:
                found = maximise(
                    known.network, sub, slopes[-1], steps=self.steps, rate=self.rate,
                    done=lambda best, worst=worst: worst(best) > 0,
                )  # fmt: skip
            except OutOfTime:
                rows.append(torch.full_like(sub.offsets, -torch.inf))
                continue
            rows.append(found.best)
            slopes[-1] = found.alphas
            point = some.region.nearest(minimiser(found, region, found.best.argmin(1)))
            wrong = ~holds(some.specification, known.network(point.to(known.rows.dtype))) & ~(worst(found.best) > 0)
            for number in wrong.nonzero().flatten().tolist():
                if self.judge(some, number, point[number]):
                    counterexamples[int(part[number])] = point[number]
        known = Known(known.network, known.rows, known.bounds, torch.cat(slopes)).with_rows(torch.cat(rows))
        proved = proof(problem, known)
        statuses: list[Status | None] = [
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
        known = known if known.bounds else _bounded(problem, known)
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
