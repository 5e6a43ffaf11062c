"""The attack on a perturbation set where nobody names one: the set's class says it, for each purpose."""

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
        InputError: the set's class names an attack that is none, or fields that it does not have.
    """
    return _built(type(ball), purpose)


def attack_field(purpose: Purpose) -> Any:
    """A dataclass' field ``attack: Attack | None``, None by default. In a recipe a section without a ``type`` changes
    fields of the attack that the balls of norms have for this purpose."""
    return none_or(default_attack(LinfBall(), purpose))


@cache
def _built(kind: type[PerturbationSet], purpose: Purpose) -> Attack[Any]:
    return structure(Attack, kind.default_attack_of(purpose), f"{kind.__name__}.default_attacks.{purpose}")
