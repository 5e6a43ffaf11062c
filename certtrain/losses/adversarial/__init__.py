"""Empirical adversarial training: one method, one file. Adding one is one file, and its name here."""

from .base import AdversarialLoss, AdversarialTraining, Passes, Wrapper
from .fait import Fait
from .fast_bat import FastBat
from .fgsm import Fgsm
from .fgsm_rs import FgsmRs
from .mer import Mer
from .n_fgsm import NFgsm
from .pgd2_at import Pgd2At
from .pgd_at import PgdAt
from .qub import Qub, quadratic_upper_bound
from .score import Score
from .trades import Trades

__all__ = [
    "AdversarialLoss", "AdversarialTraining", "Fait", "FastBat", "Fgsm", "FgsmRs", "Mer", "NFgsm",
    "Passes", "Pgd2At", "PgdAt", "Qub", "Score", "Trades", "Wrapper", "quadratic_upper_bound",
]  # fmt: skip
