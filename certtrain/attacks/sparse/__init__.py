"""Attacks that change few pixels, within a ``SparseBall``."""

from .corner_search import CornerSearch
from .nuclear import SparseNuclear
from .pgd0 import Pgd0
from .saif import Saif
from .sigma_zero import SigmaZero
from .sparse_rs import SparseRs
from .spgd import SparsePgd
from .transferred import SparseTransferred

__all__ = [
    "CornerSearch", "Pgd0", "Saif", "SigmaZero", "SparseNuclear", "SparsePgd", "SparseRs", "SparseTransferred",
]  # fmt: skip
