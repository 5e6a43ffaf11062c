"""The recipe's ``certify`` section and the stages that it builds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..attacks import Attack, attack_field, default_attack
from ..bounds import PerturbationSet
from ..bounds.memory import size_of
from ..bounds.rounding import FLOAT32, REAL, Rounding
from ..errors import InputError, check
from .lirpa import Method
from .search import Search
from .stage import Judge, Replay, Stage

Arithmetic = Literal["nearest", "real", "float32"]
FIRST = "clean"
"""Name of the stage with which every cascade begins."""
ROUNDINGS: dict[Arithmetic, Rounding] = {"real": REAL, "float32": FLOAT32}


@dataclass(frozen=True)
class Certify:
    """The recipe's ``certify`` section: how the test split is certified.

    Args:
        enabled: whether a run ends with certification; without it the network need not be traceable.
        stages: stages after the clean prediction, in this order; by default the cheapest first (an attack on every
            image takes 40 times as long as IBP, and cannot refute what IBP proves). Each is a name (``Stage.named()``)
            or a section with a ``type`` and the stage's own fields. ``location`` is for sparse sets, where it also
            replaces ``bab``. If all of them are ``lirpa`` or ``attack`` the network need not be traceable.
        attack: attack of the attack stage; null for the set's default: PGD-40 with 5 restarts, or sPGD-300 for a sparse
            set.
        images: number of test images, the first ones; null for all.
        batch_size: images in one batch.
        timeout: seconds for an image, over all stages, as its share of the time of its batches. Stages check the clock
            between layers and chunks and keep their results so far; n images take at most n times as long.
        alpha_steps: steps of the ascent on slopes in the stage ``alpha``, and in ``lirpa`` with that method.
        falsifying_share: largest share of an image's time that the stage ``falsify`` takes.
        lirpa: method of the stage ``lirpa``, which needs auto_LiRPA to be installed.
        search: settings of branch and bound, or the name of a preset.
        memory: limit of the process' memory, such as ``2GiB`` or ``512MiB``, kept by computing less at a time; null for
            what is free. On a GPU it limits the GPU's memory as well.
        arithmetic: arithmetic in which ``verified`` holds. ``nearest``: of bounds computed with rounding to nearest,
            whose errors are not covered; ``real``: exact arithmetic; ``float32``: every order in which the folded
            network can be evaluated in float32.
        proofs: whether a proof of each verified image is written, for ``certtrain check`` (docs/proofs.md). Then
            ``nearest``, which proofs do not speak of, stands for ``real``.
    """

    enabled: bool = True
    stages: tuple[str | Stage, ...] = ("ibp", "crown_ibp", "attack", "crown", "alpha", "bab")
    attack: Attack | None = attack_field("falsify")
    images: int | None = None
    batch_size: int = 256
    timeout: float = 60.0
    alpha_steps: int = 20
    falsifying_share: float = 1.0
    lirpa: Method = "crown"
    search: Search = Search()
    memory: int | str | None = None
    arithmetic: Arithmetic = "nearest"
    proofs: bool = False

    def __post_init__(self) -> None:
        if self.proofs and self.arithmetic == "nearest":
            object.__setattr__(self, "arithmetic", "real")
        known = Stage.named()
        for stage in self.stages:
            if isinstance(stage, str):
                accepted = f"{', '.join(sorted({*known} - {FIRST}))}, or that of a class named by --plugin"
                check(stage in known and stage != FIRST, "stages", stage, accepted)
        names = tuple(stage if isinstance(stage, str) else stage.name for stage in self.stages)
        check(len(set(names)) == len(names), "stages", names, "each stage once")
        check(self.images is None or self.images >= 1, "images", self.images, "a whole number >= 1, or null")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number >= 1")
        check(0 < self.timeout < float("inf"), "timeout", self.timeout, "seconds > 0")
        if self.memory is not None:
            size_of(self.memory)
        check(self.alpha_steps >= 0, "alpha_steps", self.alpha_steps, "a whole number >= 0")
        check(0 <= self.falsifying_share <= 1, "falsifying_share", self.falsifying_share, "0 to 1")

    def check_ball(self, ball: PerturbationSet) -> None:
        """
        Raises:
            InputError: a stage does not take this set, or the arithmetic has no bounds over it.
        """
        if self.arithmetic != "nearest" and not ball.is_box:
            found = f"{self.arithmetic} for a {ball.kind}"
            raise InputError(f"certify.arithmetic: found {found}; accepted: nearest, or a box (LinfBall)")
        for place, stage in enumerate(self.stages):
            where = "certify" if isinstance(stage, str) else f"certify.stages[{place}]"
            self._stage(stage).check_ball(ball, where)

    def over(self, ball: PerturbationSet) -> Certify:
        """The section with the set's default attack filled in where it names none."""
        return replace(self, attack=self.attack or default_attack(ball, "falsify"))

    def build(self, seed: int, replay: Replay | None = None) -> list[Stage]:
        """The stages, the clean prediction first."""
        judge = Judge(replay)
        return [self._stage(FIRST).prepared(seed, judge), *self.stages_for(seed, judge)]

    def stages_for(self, seed: int, judge: Judge) -> list[Stage]:
        """The stages after the clean prediction, with the judge of their counterexamples."""
        return [self._stage(stage).prepared(seed, judge) for stage in self.stages]

    def has_more_stages(self, had: Certify) -> bool:
        """Whether it has a stage that ``had`` lacks or has with other fields; timeouts are ignored."""
        known = [stage.within(0.0)[0] for stage in had.build(0)]
        return any(stage.within(0.0)[0] not in known for stage in self.build(0))

    def _stage(self, stage: str | Stage) -> Stage:
        return Stage.named()[stage].from_section(self) if isinstance(stage, str) else stage
