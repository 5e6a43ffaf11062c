from dataclasses import dataclass

from ...attacks import Attack, EarlyStopped
from .trades import Trades


@dataclass(frozen=True)
class FriendlyTrades(Trades):
    """Friendly adversarial training for TRADES: the attack of each sample stops soon after it is misclassified (Zhang
    et al., arXiv 2002.11242).

    The steps ascend the divergence; the predicted label decides when to stop. Tau, ``attack.patience``, is 0 up to
    epoch 30, 1 up to 50, 2 up to 70, then 3; with tau = the number of steps this is TRADES.
    """

    attack: Attack | None = EarlyStopped(attack_mode="eval", steps=10, step_size=0.25, start="normal", start_scale=1e-3)
