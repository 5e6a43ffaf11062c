"""Attacks: configured objects with one call. Adding one is one file, and one line here."""

from .ascent import Ascent
from .base import Attack, AttackResult, gradient_of
from .linearisation import Linearisation
from .objective import CrossEntropy, Divergence, KullbackLeibler, Objective, SquaredEuclidean
from .pgd import Pgd

__all__ = [
    "Ascent", "Attack", "AttackResult", "CrossEntropy", "Divergence", "KullbackLeibler", "Linearisation", "Objective",
    "Pgd", "SquaredEuclidean", "gradient_of",
]  # fmt: skip
