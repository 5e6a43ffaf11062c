"""What every stage of the cascade is: a configured object, found by its name, that says itself what it needs."""

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
from .bounds_so_far import BoundsSoFar
from .problem import Problem, Specification, Status

if TYPE_CHECKING:
    from .settings import Certify

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
    known: BoundsSoFar
    lower: Tensor | None = None
    counterexamples: Sequence[Tensor | None] | None = None
    seconds: Tensor | None = None
    reasons: Sequence[str | None] | None = None


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


@dataclass(frozen=True)
class Stage(Component):
    """Looks at the problems that earlier stages left open. Its fields are its section in a recipe:
    ``certify: {stages: [ibp, my_stage]}`` takes their defaults, ``{type: MyStage, depth: 3}`` sets them.

    It looks at the clock (``bounds.clock``) between the pieces of its work. Out of time it returns what it knows by
    then, or raises ``OutOfTime``. Where memory runs out it is called again, with half of the problems.
    """

    name: ClassVar[str] = ""
    """Its name in recipes and verdicts; no two stages share one, and one without is in no recipe."""
    traces: ClassVar[bool] = True
    """Whether it needs the network traced; without, it only runs it, and takes any network."""

    @abstractmethod
    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        """Decide what it can of a batch of problems. ``verified`` may rest on sound bounds alone, ``falsified`` on an
        input that a ``Judge`` has confirmed. A problem whose region it does not take stays open, with a reason."""

    @classmethod
    def named(cls) -> dict[str, type[Stage]]:
        """All stages, by their names.

        Raises:
            InputError: two of them share one.
        """
        found: dict[str, type[Stage]] = {}
        for stage in cls.members().values():
            if stage.name and found.setdefault(stage.name, stage) is not stage:
                both = f"{found[stage.name].__name__} and {stage.__name__}"
                raise InputError(f"certify.stages: found {both}, both named {stage.name}; accepted: a name for each")
        return found

    @classmethod
    def from_section(cls, settings: Certify) -> Self:
        """The stage that a recipe means by the name alone."""
        return cls()

    def prepared(self, seed: int, judge: Judge) -> Self:
        """This stage with what a run gives it: the seed of its random numbers, and who confirms counterexamples."""
        return self

    def check_ball(self, ball: PerturbationSet, where: str = "certify") -> None:
        """Refuse, before anything is done, a perturbation set that would be an error; ``where`` is its section.

        Raises:
            InputError: says what would be accepted.
        """

    def fitting(self, problem: Problem) -> Stage:
        """The stage that does its work over such a region: itself, as a rule."""
        return self

    def within(self, seconds: float) -> tuple[Self, bool]:
        """This stage with so many seconds for an image at most, and whether its own timeout comes first."""
        return self, False

    def versions(self) -> Mapping[str, str]:
        """The packages outside certtrain that its verdicts rest on.

        Raises:
            InputError: one of them is missing.
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
    return [status if done else None for done in decided.tolist()]


def proof(problem: Problem, known: BoundsSoFar) -> Finding:
    """What the rows' lower bounds prove."""
    return Finding(where_true(problem.specification.worst(known.rows) > 0, "verified"), known)


def undecided(problem: Problem, known: BoundsSoFar, why: str) -> Finding:
    """No decision, for a reason that holds for all of the problems."""
    return Finding([None] * len(problem), known, reasons=[why] * len(problem))


def holds(specification: Specification, logits: Tensor) -> Tensor:
    """(B,), written so that NaN does not hold."""
    return specification.worst(specification.values(logits)) > 0
