"""The default attack on a perturbation set, which the set's class defines for each purpose."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..bounds import LinfBall, PerturbationSet
from ..bounds.perturbation import Purpose
from ..config import none_or, structure
from .base import Attack


def default_attack(ball: PerturbationSet, purpose: Purpose) -> Attack[Any]:
    """The attack that ``attack: null`` means for this set: its ``default_attacks``, read like a section of a recipe.

    Raises:
        InputError: the section names an unknown attack, or fields that the attack does not have.
    """
    return _built(type(ball), purpose)


def attack_field(purpose: Purpose) -> Any:
    """A dataclass field ``attack: Attack | None``, None by default.

    A recipe's section without a ``type`` changes fields of the norm balls' default attack for this purpose.
    """
    return none_or(default_attack(LinfBall(), purpose))


@cache
def _built(kind: type[PerturbationSet], purpose: Purpose) -> Attack[Any]:
    return structure(Attack, kind.default_attack_of(purpose), f"{kind.__name__}.default_attacks.{purpose}")
