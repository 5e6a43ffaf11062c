"""Training methods, one file each. Adding one is one file, and its name here."""

from . import adversarial
from .adversarial import *  # noqa: F403
from .base import Loss, LossTerms, Ramp
from .cc_dist import CcDist
from .cc_ibp import CcIbp
from .crown_ibp import CrownIbp
from .exp_ibp import ExpIbp
from .ibp import Ibp
from .mtl_ibp import MtlIbp
from .sabr import Sabr
from .staps import Staps
from .taps import Taps

__all__ = [
    "CcDist", "CcIbp", "CrownIbp", "ExpIbp", "Ibp", "Loss", "LossTerms", "MtlIbp", "Ramp", "Sabr", "Staps", "Taps",
]  # fmt: skip
__all__ += adversarial.__all__
