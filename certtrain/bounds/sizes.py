"""What the sizes of perturbation sets are called, wherever they are said."""

from __future__ import annotations

from .sparse import SparseBall


def size_name(kind: str) -> str:
    """Of sets of a kind, by its class' name: a sparse one has k units, others a radius ``epsilon``."""
    return "k" if kind == SparseBall.__name__ else "epsilon"


def sized(kind: str, size: float, digits: int = 6) -> str:
    """``k 20``, ``epsilon 0.0313725``."""
    return f"{size_name(kind)} {int(size)}" if size_name(kind) == "k" else f"epsilon {size:.{digits}g}"
