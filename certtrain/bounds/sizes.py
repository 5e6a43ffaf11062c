"""Names of perturbation sets' sizes, by the class name that records hold."""

from __future__ import annotations

from .perturbation import PerturbationSet


def size_name(kind: str) -> str:
    """The name of the size field of a set's class: ``k``, ``epsilon``."""
    return _class_of(kind).size


def sized(kind: str, size: float, digits: int = 6) -> str:
    """A size with its name: ``k 20``, ``epsilon 0.0313725``."""
    return _class_of(kind).sized(size, digits)


def _class_of(kind: str) -> type[PerturbationSet]:
    """The set's class of that name; ``PerturbationSet`` if no such class is imported."""
    return PerturbationSet.members().get(kind, PerturbationSet)
