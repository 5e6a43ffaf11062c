"""Methods of empirical adversarial training, one file each. Adding one is one file, and its name here."""

from .atta import Atta
from .base import AdversarialLoss, AdversarialTraining, Passes, Wrapper
from .fait import Fait
from .fast_bat import FastBat
from .fgsm import Fgsm
from .fgsm_ckpt import FgsmCkpt
from .fgsm_ga import FgsmGa
from .fgsm_pgi import FgsmPgi
from .fgsm_rs import FgsmRs
from .free_at import FreeAt
from .friendly_trades import FriendlyTrades
from .gairat import Gairat
from .hat import Hat
from .mart import Mart
from .mer import Mer
from .n_aaer import NAaer
from .n_fgsm import NFgsm
from .nu_at import NuAt
from .pgd2_at import Pgd2At
from .pgd_at import PgdAt
from .qub import Qub, quadratic_upper_bound
from .score import Score
from .self_adaptive import SelfAdaptive
from .trade_off import TradeOff
from .trades import Trades

__all__ = [
    "AdversarialLoss", "AdversarialTraining", "Atta", "Fait", "FastBat", "Fgsm", "FgsmCkpt", "FgsmGa", "FgsmPgi",
    "FgsmRs", "FreeAt", "FriendlyTrades", "Gairat", "Hat", "Mart", "Mer", "NAaer", "NFgsm", "NuAt", "Passes",
    "Pgd2At", "PgdAt", "Qub", "Score", "SelfAdaptive", "TradeOff", "Trades", "Wrapper", "quadratic_upper_bound",
]  # fmt: skip
