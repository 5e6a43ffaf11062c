from dataclasses import dataclass

from ...attacks import Attack, Transferred
from .base import AdversarialTraining


@dataclass(frozen=True)
class Atta(AdversarialTraining):
    """ATTA: each sample's attack starts where it ended an epoch before (Zheng et al., arXiv 1912.11969).

    The attack works with other losses too: ``{type: Trades, attack: {type: Transferred}}`` is ATTA with TRADES, with
    the published weight 6. The authors' code divides the mean of this loss by the batch size once more; this one not:
    the recipe's rate is divided, and its weight decay multiplied, in its place.

    Over a sparse set the attack is ``{type: SparseTransferred}``.
    """

    attack: Attack | None = Transferred(attack_mode="eval")
