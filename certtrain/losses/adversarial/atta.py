from dataclasses import dataclass

from ...attacks import Attack, Transferred
from .base import AdversarialTraining


@dataclass(frozen=True)
class Atta(AdversarialTraining):
    """ATTA: attacks that go on where the sample's last epoch ended (Zheng et al., arXiv 1912.11969).

    The attack serves other losses too: ``{type: Trades, attack: {type: Transferred}}`` is ATTA with TRADES, its weight
    6 as published. The authors' code divides the mean of this loss by the batch size once more; here it does not.

    Over a sparse set the attack is ``{type: SparseTransferred}``.
    """

    attack: Attack | None = Transferred(attack_mode="eval")
