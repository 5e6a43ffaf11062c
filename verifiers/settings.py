"""The recipe's ``certify`` section, and the stages that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..attacks import Attack, customary
from ..bounds import PerturbationSet
from ..bounds.rounding import FLOAT32, REAL, Rounding
from ..errors import InputError, check
from .lirpa import LirpaStage, Method
from .search import Search
from .stages import (
    PGD,
    AlphaStage,
    AttackStage,
    BabStage,
    CleanStage,
    CrownStage,
    IbpStage,
    InputSplitStage,
    Judge,
    LocationStage,
    Replay,
    Stage,
)  # fmt: skip

Arithmetic = Literal["nearest", "real", "float32"]
ROUNDINGS: dict[Arithmetic, Rounding] = {"real": REAL, "float32": FLOAT32}


@dataclass(frozen=True)
class Certify:
    """The recipe's ``certify`` section: what is proved of the test split, and how.

    Args:
        enabled: whether a run ends with it; a network that is not to be certified need not be traceable.
        stages: after the clean prediction, in this order: by default the cheapest first (an attack on every image takes
            40 times as long as IBP, and cannot refute what IBP proves). ``location`` is for sparse sets, where it
            also stands in for ``bab``.
            With ``lirpa`` and ``attack`` alone, networks are taken that cannot be traced.
        attack: of the attack stage; over a sparse set sPGD-300, unless another one is given.
        images: the first so many test images; null for all.
        batch_size: images that share a batch.
        timeout: seconds for an image, over all stages: its share of the time of the batches that it is in. Stages look
            at the clock between their layers and chunks, and keep what they know by then; so many images take so many
            times as long at most.
        alpha_steps: of the ascent on slopes.
        lirpa: whose bounds the stage of that name takes from auto_LiRPA, which has to be installed.
        search: how branch and bound goes about it.
        arithmetic: in which ``verified`` holds. ``nearest``: as bounds come out, rounded to nearest; ``real``: in exact
            arithmetic; ``float32``: for every order in which the folded network can be evaluated in float32.
    """

    enabled: bool = True
    stages: tuple[
        Literal["attack", "ibp", "crown_ibp", "crown", "alpha", "lirpa", "input_split", "location", "bab"], ...
    ] = (
        "ibp", "crown_ibp", "attack", "crown", "alpha", "bab",
    )  # fmt: skip
    attack: Attack = PGD
    images: int | None = None
    batch_size: int = 256
    timeout: float = 60.0
    alpha_steps: int = 20
    lirpa: Method = "crown"
    search: Search = Search()
    arithmetic: Arithmetic = "nearest"

    def __post_init__(self) -> None:
        check(len(set(self.stages)) == len(self.stages), "stages", self.stages, "each stage once")
        check(self.images is None or self.images >= 1, "images", self.images, "a whole number >= 1, or null")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number >= 1")
        check(0 < self.timeout < float("inf"), "timeout", self.timeout, "seconds > 0")
        check(self.alpha_steps >= 0, "alpha_steps", self.alpha_steps, "a whole number >= 0")

    def check_ball(self, ball: PerturbationSet) -> None:
        """
        Raises:
            InputError: the attack does not know such a set, or the arithmetic has no bounds over it.
        """
        if self.arithmetic != "nearest" and not ball.is_box:
            found = f"{self.arithmetic} for a {type(ball).__name__}"
            raise InputError(f"certify.arithmetic: found {found}; accepted: nearest, or a box (LinfBall)")
        customary(self.attack, PGD, ball, 300).check_ball(ball, "certify.attack")

    def build(self, seed: int, replay: Replay | None = None) -> list[Stage]:
        judge = Judge(replay)
        later: dict[str, Stage] = {
            "attack": AttackStage(self.attack, seed, judge),
            "ibp": IbpStage(),
            "crown_ibp": CrownStage("crown_ibp", refine=False),
            "crown": CrownStage(),
            "alpha": AlphaStage(self.alpha_steps, judge=judge),
            "lirpa": LirpaStage(self.lirpa, self.alpha_steps),
            "input_split": InputSplitStage(self.timeout, judge),
            "location": LocationStage(self.search, self.timeout, judge),
            "bab": BabStage(self.search, self.timeout, judge),
        }
        return [CleanStage(), *(later[name] for name in self.stages)]
