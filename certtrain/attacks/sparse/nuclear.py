from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...bounds import SparseBall
from ...errors import check
from ..nuclear import NuclearNormAttack
from .spgd import SparsePgd


@dataclass(frozen=True)
class SparseNuclear(NuclearNormAttack[SparseBall], SparsePgd):
    """NuAT's attack on few pixels: one update of sPGD that maximises the nuclear norm too, in every other iteration.

    The transfer from l_inf is ours: the source names NuAT over its l0 attack without details (Zhong et al., NeurIPS
    2025).

    Args:
        keep: ``last``: the norm belongs to the batch, so that single images have no best point.
    """

    steps: int = 1
    alpha: float = 1.0
    beta: float = 1.0
    patience: int | None = None
    keep: Literal["best", "last"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.keep == "last", "keep", self.keep, "last: the nuclear norm is no number of an image")
