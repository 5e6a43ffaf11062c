"""The recipe's ``evaluate`` section."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..bounds import PerturbationSet
from ..errors import InputError, check
from .adversary import Adversary, RestartedPgd
from .autoattack import AutoAttack

ACCEPTED = "pgd-STEPS, pgd-STEPS-RESTARTS (such as pgd-10, pgd-20, pgd-50-10, pgd-100), autoattack, autoattack-cheap"
Which = Literal["last", "best"]
CHECKPOINTS: tuple[Which, ...] = get_args(Which)
_PGD = re.compile(r"pgd-([1-9][0-9]{0,5})(?:-([1-9][0-9]{0,5}))?")


@dataclass(frozen=True)
class Evaluate:
    """How many test images attacks leave right, beside clean accuracy and what IBP certifies.

    Args:
        enabled: whether a run ends with this.
        attacks: ``pgd-STEPS``, ``pgd-STEPS-RESTARTS``, ``autoattack`` (version standard), ``autoattack-cheap`` (APGD
            with 20 steps, Square with 200 queries, no FAB).
        epsilons: radii in pixel units; empty for the recipe's own.
        images: the first so many test images; null for all.
        step_size: of PGD, in epsilons: 1/4 is 2/255 at 8/255, as published.
        batch_size: images that are attacked at once, and that a stopped evaluation may lose. AutoAttack's random
            numbers depend on it, nothing else does.
        checkpoints: of ``last`` and ``best``; empty for all that there are.
    """

    enabled: bool = False
    attacks: tuple[str, ...] = ("pgd-20", "pgd-50-10")
    epsilons: tuple[float, ...] = ()
    images: int | None = None
    step_size: float = 0.25
    batch_size: int = 256
    checkpoints: tuple[Which, ...] = ()

    def __post_init__(self) -> None:
        for name in self.attacks:
            check(adversary_of(name) is not None, "attacks", name, ACCEPTED)
        for epsilon in self.epsilons:
            check(0 <= epsilon < math.inf, "epsilons", epsilon, "numbers >= 0, in pixel units of [0, 1]")
        check(self.images is None or self.images >= 1, "images", self.images, "a whole number >= 1, or null")
        check(0 < self.step_size < math.inf, "step_size", self.step_size, "a number > 0, in epsilons")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number >= 1")
        known = all(name in CHECKPOINTS for name in self.checkpoints)
        check(known, "checkpoints", self.checkpoints, f"a list of {', '.join(CHECKPOINTS)}")

    def adversaries(self) -> list[Adversary]:
        """The attacks, each once."""
        found = [adversary_of(name, self.step_size) for name in self.attacks]
        return list({adversary.name: adversary for adversary in found if adversary is not None}.values())

    def check_ball(self, ball: PerturbationSet, images: Tensor | None = None) -> None:
        """
        Raises:
            InputError: an attack does not know such a set or, where they are given, such images, or misses a package.
        """
        for adversary in self.adversaries():
            if reason := adversary.refuses(None, images, ball):
                raise InputError(f"{adversary.name}: {reason}")


def adversary_of(name: str, step_size: float = 0.25) -> Adversary | None:
    """The attack of that name; None where there is none."""
    if found := _PGD.fullmatch(name):
        return RestartedPgd(name, int(found[1]), int(found[2] or 1), step_size)
    known = {"autoattack": AutoAttack(), "autoattack-cheap": AutoAttack("autoattack-cheap", 20, 200, fab=False)}
    return known.get(name)
