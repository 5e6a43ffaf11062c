"""Attacks: configured objects with one call. Adding one is one file, and one line here."""

from .ascent import Ascent
from .base import Attack, AttackResult, gradient_of
from .checkpoints import Checkpoints
from .early_stopped import EarlyStopped
from .linearisation import Linearisation
from .modes import buffers_kept, in_mode
from .nuclear import Nuclear, nuclear_norm
from .objective import CrossEntropy, Divergence, KullbackLeibler, Objective, SquaredEuclidean
from .pgd import Pgd
from .prior import PriorGuided, SmoothedCrossEntropy
from .transferred import Transferred

__all__ = [
    "Ascent", "Attack", "AttackResult", "Checkpoints", "CrossEntropy", "Divergence", "EarlyStopped",
    "KullbackLeibler", "Linearisation", "Nuclear", "Objective", "Pgd", "PriorGuided", "SmoothedCrossEntropy",
    "SquaredEuclidean", "Transferred", "buffers_kept", "gradient_of", "in_mode", "nuclear_norm",
]  # fmt: skip
