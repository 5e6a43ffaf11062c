"""The stage for networks that share their inputs: it bounds one by its difference from another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from ..bounds.overflow import fits
from ..errors import check
from ..typed import as_bools, as_ints
from .bounds_so_far import BoundsSoFar
from .differences import difference_network
from .input_split import BATCH, few_inputs
from .problem import Problem, Status
from .search_statistics import SearchStatistics
from .stage import Finding, Judge, TimedStage, undecided
from .stages import AlphaStage, CrownStage, InputSplitStage

if TYPE_CHECKING:
    from .settings import Certify


@dataclass(frozen=True)
class DifferenceStage(TimedStage):
    """Verifies or falsifies properties of outputs of several networks of one graph, bounding the later ones by their
    differences from the first (``difference_network``): by CROWN; then, of the problems whose bounds are tighter so,
    those of few inputs by halving these, and others by alpha-CROWN. Leaves the rest to the stages behind it.

    Args:
        alpha_steps: steps of the ascent on slopes, where many inputs vary.
        timeout: seconds for an image.
        batch: most boxes halved in one round.
        share: largest share of the seconds for halving; the rest is that of the stages behind it, since a few pairs are
            easier side by side.
    """

    name: ClassVar[str] = "difference"
    alpha_steps: int = 20
    timeout: float = 60.0
    judge: Judge = field(default_factory=Judge)
    batch: int = BATCH
    share: float = 0.6

    def __post_init__(self) -> None:
        check(self.alpha_steps >= 0, "alpha_steps", self.alpha_steps, "a whole number >= 0")
        check(self.batch >= 1, "batch", self.batch, "a whole number >= 1")
        check(0 < self.share <= 1, "share", self.share, "a number in (0, 1]")

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        return cls(settings.alpha_steps, settings.timeout)

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        network = difference_network(known.network)
        if network is None:
            return undecided(problem, known, "differences are bounded of networks of one graph on the same inputs")
        found = CrownStage()(problem, BoundsSoFar(network, torch.full_like(known.rows, -torch.inf), {}))
        own, worst = found.known, problem.specification.worst
        good = fits(network, own.region_of(problem), own.bounds)
        tighter, proved = good & (worst(own.rows) > worst(known.rows)), good & (worst(own.rows) > 0)
        statuses: list[Status | None] = ["verified" if done else None for done in as_bools(proved)]
        rows = torch.where(good.unsqueeze(1), own.rows, -torch.inf)
        first = Finding(statuses, known.with_rows(rows))
        left = (tighter & ~proved).nonzero().flatten()
        if not len(left):
            return first
        some = problem.subset(left)
        if few_inputs(some):
            stage = InputSplitStage(self.share * self.timeout, self.judge, self.batch)
        else:
            stage = AlphaStage(self.alpha_steps, judge=self.judge)
        return _with_part(first, left, stage(some, own.subset(left)))


def _with_part(whole: Finding, numbers: torch.Tensor, part: Finding) -> Finding:
    """A finding with that of the problems ``numbers`` in it, which were open."""
    count = len(whole.statuses)
    statuses, reasons = list(whole.statuses), list[str | None]([None] * count)
    counterexamples = list[torch.Tensor | None]([None] * count)
    search = [SearchStatistics() for _ in range(count)]
    for own, number in enumerate(as_ints(numbers)):
        statuses[number] = None if part.statuses[own] == "timeout" else part.statuses[own]
        reasons[number] = part.reasons[own] if part.reasons else None
        counterexamples[number] = part.counterexamples[own] if part.counterexamples else None
        search[number] = part.search[own] if part.search else SearchStatistics()
    rows, seconds = whole.known.rows.clone(), None
    rows[numbers] = torch.maximum(rows[numbers], part.known.rows)
    lower = torch.full_like(rows[:, 0], -torch.inf)
    if part.lower is not None:
        lower[numbers] = part.lower.to(lower.dtype)
    if part.seconds is not None:
        seconds = torch.zeros(count, dtype=part.seconds.dtype, device=part.seconds.device)
        seconds[numbers] = part.seconds
    return replace(
        whole, statuses=statuses, known=replace(whole.known, rows=rows), lower=lower, counterexamples=counterexamples,
        seconds=seconds, reasons=reasons, search=search if part.search else None,
    )  # fmt: skip
