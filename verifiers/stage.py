"""The base class of the cascade's stages: configured objects, registered by name, which state their own needs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ..bounds import PerturbationSet, forward
from ..config import Component
from ..errors import InputError
from ..typed import as_bools
from .bounds_so_far import BoundsSoFar
from .problem import Problem, Specification, Status
from .search_statistics import SearchStatistics

if TYPE_CHECKING:
    from .settings import Certify

Replay = Callable[[Tensor], Tensor]
"""Maps an image (*shape) to its logits (R, K) in R runs of the network; a counterexample must be wrong in all."""


@dataclass(frozen=True)
class Finding:
    """Results of a stage for a batch of B problems.

    Args:
        statuses: one for each problem; None where it stays open.
        known: bounds for the next stage, including this stage's.
        lower: (B,) lower bounds of the worst margin, where these are tighter than those of the rows in ``known``.
        counterexamples: one for each problem that a counterexample decided.
        seconds: (B,) time spent on each problem; None for equal shares.
        reasons: why problems stay open, where a reason is known.
        search: counts and times of the search for each problem; None for a stage without a search.
    """

    statuses: Sequence[Status | None]
    known: BoundsSoFar
    lower: Tensor | None = None
    counterexamples: Sequence[Tensor | None] | None = None
    seconds: Tensor | None = None
    reasons: Sequence[str | None] | None = None
    search: Sequence[SearchStatistics] | None = None


@dataclass(frozen=True)
class Judge:
    """Decides whether an input is a counterexample: it lies in the region, and the network is wrong on it in a batch of
    one. A tie is wrong.

    Args:
        replay: further runs of the network, such as onnxruntime's, which must all be wrong too.
    """

    replay: Replay | None = None

    def __call__(self, problem: Problem, number: int, image: Tensor) -> bool:
        at = torch.tensor([number], device=problem.index.device)
        one = problem.subset(at)
        if not bool(one.region.contains(image[None])[0]):
            return False
        runs = [forward(problem.network, image[None]).logits]
        runs += torch.split(self.replay(image).to(image.device), 1) if self.replay else []
        return not any(bool(holds(one.specification, logits)[0]) for logits in runs)


@dataclass(frozen=True)
class Stage(Component):
    """A stage of the cascade, which tries to decide the problems that earlier stages left open.

    Its fields are its section in a recipe: ``certify: {stages: [ibp, my_stage]}`` takes their defaults, ``{type:
    MyStage, depth: 3}`` sets them. It checks the clock (``bounds.clock``) between pieces of its work; out of time it
    returns its results so far or raises ``OutOfTime``. Where memory runs out it is called again with half of the
    problems.
    """

    name: ClassVar[str] = ""
    """Name in recipes and verdicts, unique; a stage without a name cannot be named in a recipe."""
    traces: ClassVar[bool] = True
    """Whether it needs a traced network; a stage that does not only runs the network, and takes any."""

    @abstractmethod
    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        """Decide as many as possible of a batch of problems. ``verified`` needs sound bounds, ``falsified`` an input
        that a ``Judge`` has confirmed. A problem over a region that the stage does not take stays open, with a
        reason."""

    @classmethod
    def named(cls) -> dict[str, type[Stage]]:
        """All stages with a name, by name.

        Raises:
            InputError: two stages share a name.
        """
        stages: dict[str, type[Stage]] = {}
        for stage in cls.members().values():
            if stage.name and stages.setdefault(stage.name, stage) is not stage:
                both = f"{stages[stage.name].__name__} and {stage.__name__}"
                raise InputError(f"certify.stages: found {both}, both named {stage.name}; accepted: a name for each")
        return stages

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        """The stage for its bare name in a recipe, with fields from the recipe's ``certify`` section."""
        return cls()

    def prepared(self, seed: int, judge: Judge) -> Self:
        """This stage with a run's values: the seed of its random numbers, and the judge of its counterexamples."""
        return self

    def check_ball(self, ball: PerturbationSet, where: str = "certify") -> None:
        """Check a perturbation set before a run; ``where`` is the section named in the error.

        Raises:
            InputError: the stage fails on such a set.
        """

    def fitting(self, problem: Problem) -> Stage:
        """The stage to run over the problem's region in place of this one; itself by default."""
        return self

    def within(self, seconds: float) -> tuple[Self, bool]:
        """(stage, own): this stage limited to ``seconds`` for an image, and whether its own timeout comes first."""
        return self, False

    def versions(self) -> Mapping[str, str]:
        """Versions of the packages outside certtrain that its verdicts rest on, by name.

        Raises:
            InputError: a package is missing.
        """
        return {}


class TimedStage(Stage):
    """A stage with a timeout of its own, in seconds for an image."""

    timeout: float
    judge: Judge

    def prepared(self, seed: int, judge: Judge) -> Self:
        changes: Any = {"judge": judge}
        return replace(self, **changes)

    def within(self, seconds: float) -> tuple[Self, bool]:
        changes: Any = {"timeout": max(0.0, min(seconds, self.timeout))}
        return replace(self, **changes), seconds >= self.timeout


def where_true(decided: Tensor, status: Status) -> list[Status | None]:
    """``status`` where ``decided`` (B,) is true, else None."""
    return [status if done else None for done in as_bools(decided)]


def proof(problem: Problem, known: BoundsSoFar) -> Finding:
    """The finding that follows from the rows' lower bounds: ``verified`` where they prove the specification."""
    return Finding(where_true(problem.specification.worst(known.rows) > 0, "verified"), known)


def undecided(problem: Problem, known: BoundsSoFar, why: str) -> Finding:
    """A finding that leaves all problems open, for the reason ``why``."""
    return Finding([None] * len(problem), known, reasons=[why] * len(problem))


def holds(specification: Specification, logits: Tensor) -> Tensor:
    """(B,) bool, whether the specification holds at logits (B, K); NaN does not hold."""
    return specification.worst(specification.values(logits)) > 0
