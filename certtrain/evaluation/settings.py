"""The recipe's ``evaluate`` section."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from ..attacks import in_mode
from ..bounds import PerturbationSet
from ..errors import FieldError, InputError, check
from .adversary import Adversary, RestartedPgd
from .autoattack import AutoAttack
from .default import DefaultAttack
from .relaxations import Relaxations
from .sparse import SPARSE, searching

ACCEPTED = (
    "pgd-STEPS, pgd-STEPS-RESTARTS (such as pgd-10, pgd-20, pgd-50-10, pgd-100), autoattack, autoattack-cheap, "
    f"default, crown; of a SparseBall {SPARSE}, default, crown"
)
Which = Literal["last", "best"]
CHECKPOINTS: tuple[Which, ...] = get_args(Which)
_PGD = re.compile(r"pgd-([1-9][0-9]{0,5})(?:-([1-9][0-9]{0,5}))?")


@dataclass(frozen=True)
class Evaluate:
    """Accuracy of the test images under attack, beside clean accuracy and accuracy certified by IBP.

    Args:
        enabled: whether a run ends with an evaluation.
        attacks: ``pgd-STEPS``, ``pgd-STEPS-RESTARTS``, ``autoattack`` (version standard), ``autoattack-cheap`` (APGD
            with 20 steps, Square with 200 queries, no FAB); for a SparseBall those of ``SPARSE``; for every set
            ``default``, its own attack, and ``crown``, certification by linear relaxations.
        epsilons: radii in pixel units, for a SparseBall whole numbers k; empty for the recipe's own.
        images: number of test images, from the first on; null for all.
        step_size: step size of PGD in epsilons; 1/4 is 2/255 at 8/255, as published.
        batch_size: images that are attacked together, and that a stopped evaluation may lose. Only AutoAttack's random
            numbers depend on it.
        checkpoints: some of ``last`` and ``best``; empty for all that exist.
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
            accepted = "numbers >= 0, in pixel units of [0, 1]; of a SparseBall whole ones"
            check(0 <= epsilon < math.inf, "epsilons", epsilon, accepted)
        check(self.images is None or self.images >= 1, "images", self.images, "a whole number >= 1, or null")
        check(0 < self.step_size < math.inf, "step_size", self.step_size, "a number > 0, in epsilons")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number >= 1")
        known = all(name in CHECKPOINTS for name in self.checkpoints)
        check(known, "checkpoints", self.checkpoints, f"a list of {', '.join(CHECKPOINTS)}")

    def adversaries(self) -> list[Adversary]:
        """The attacks, without duplicates."""
        found = [adversary_of(name, self.step_size) for name in self.attacks]
        return list({adversary.name: adversary for adversary in found if adversary is not None}.values())

    def sizes(self, ball: PerturbationSet) -> tuple[float, ...]:
        """``epsilons``, or the ball's own, without duplicates; for a SparseBall as int.

        Raises:
            InputError: the set cannot have such a size.
        """
        found = []
        for size in self.epsilons or (float(ball.epsilon),):
            try:
                found.append(ball.with_epsilon(float(size)).epsilon)
            except FieldError as error:
                raise InputError(f"evaluate.epsilons: found {size!r}; accepted: {error.accepted}") from error
        return tuple(dict.fromkeys(found))

    def check_ball(self, ball: PerturbationSet, images: Tensor | None = None, model: nn.Module | None = None) -> None:
        """Check that the attacks support this set, and these images and this network if they are given.

        Args:
            images: (1, *shape). model: on their device.
        Raises:
            InputError: an attack does not support them or lacks a package, or the set cannot have one of the sizes.
        """
        self.sizes(ball)
        with nullcontext() if model is None else in_mode(model, training=False):
            for adversary in self.adversaries():
                if reason := adversary.refuses(model, images, ball):
                    raise InputError(f"{adversary.name}: {reason}")


def adversary_of(name: str, step_size: float = 0.25) -> Adversary | None:
    """The attack of this name, or None."""
    if found := _PGD.fullmatch(name):
        return RestartedPgd(name, int(found[1]), int(found[2] or 1), step_size)
    known = {"autoattack": AutoAttack(), "autoattack-cheap": AutoAttack("autoattack-cheap", 20, 200, fab=False),
             "crown": Relaxations(), "default": DefaultAttack()}  # fmt: skip
    return known.get(name) or searching(name)
