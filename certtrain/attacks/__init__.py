"""Attacks: configured objects with one call. Adding one is one file, and one line here."""

from .ascent import Ascent
from .base import Attack, AttackResult, gradient_of
from .checkpoints import Checkpoints
from .customary import customary
from .early_stopped import EarlyStopped
from .linearisation import Linearisation
from .modes import buffers_kept, in_mode
from .nuclear import Nuclear, nuclear_norm
from .objective import CrossEntropy, Divergence, KullbackLeibler, Objective, SquaredEuclidean, SwitchedMargin, lead
from .pgd import Pgd
from .prior import PriorGuided, SmoothedCrossEntropy
from .sparse import SparsePgd
from .transferred import Transferred

__all__ = [
    "Ascent", "Attack", "AttackResult", "Checkpoints", "CrossEntropy", "Divergence", "EarlyStopped",
    "KullbackLeibler", "Linearisation", "Nuclear", "Objective", "Pgd", "PriorGuided", "SmoothedCrossEntropy",
    "SparsePgd", "SquaredEuclidean", "SwitchedMargin", "Transferred", "buffers_kept", "customary", "gradient_of",
    "in_mode", "lead", "nuclear_norm",
]  # fmt: skip
