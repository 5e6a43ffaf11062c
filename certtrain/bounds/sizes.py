"""What the sizes of perturbation sets are called, where a record names a set by its class."""

from __future__ import annotations

from .perturbation import PerturbationSet


def size_name(kind: str) -> str:
    """What the size of the sets of this class is called: ``k``, ``epsilon``."""
    return _class_of(kind).size


def sized(kind: str, size: float, digits: int = 6) -> str:
    """``k 20``, ``epsilon 0.0313725``."""
    return _class_of(kind).sized(size, digits)


def _class_of(kind: str) -> type[PerturbationSet]:
    """The class of that name; the base for one that nobody has imported."""
    return PerturbationSet.members().get(kind, PerturbationSet)
