"""Attacks: configured objects with one call. Adding one is one file, and one line here."""

from .ascent import Ascent
from .base import Attack, AttackResult, gradient_of
from .checkpoints import Checkpoints
from .default import attack_field, default_attack
from .early_stopped import EarlyStopped
from .frank_wolfe import FrankWolfe
from .linearisation import Linearisation
from .modes import buffers_kept, in_mode
from .nuclear import Nuclear, NuclearNormAttack, nuclear_norm
from .objective import (
    CrossEntropy,
    Divergence,
    KullbackLeibler,
    Margin,
    Objective,
    SquaredEuclidean,
    SwitchedMargin,
    lead,
)
from .pgd import Pgd
from .prior import PriorGuided, SmoothedCrossEntropy
from .recorded import RECORDING, records_start
from .sparse import CornerSearch, Pgd0, Saif, SigmaZero, SparseNuclear, SparsePgd, SparseRs, SparseTransferred
from .transferred import Transferred

__all__ = [
    "RECORDING", "Ascent", "Attack", "AttackResult", "Checkpoints", "CornerSearch", "CrossEntropy", "Divergence",
    "EarlyStopped", "FrankWolfe", "KullbackLeibler", "Linearisation", "Margin", "Nuclear", "NuclearNormAttack",
    "Objective", "Pgd", "Pgd0", "PriorGuided", "Saif", "SigmaZero", "SmoothedCrossEntropy", "SparseNuclear",
    "SparsePgd", "SparseRs", "SparseTransferred", "SquaredEuclidean", "SwitchedMargin", "Transferred", "attack_field",
    "buffers_kept", "default_attack", "gradient_of", "in_mode", "lead", "nuclear_norm", "records_start",
]  # fmt: skip
