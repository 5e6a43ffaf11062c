from dataclasses import dataclass

from ...attacks import Attack, Checkpoints
from .base import AdversarialTraining


@dataclass(frozen=True)
class FgsmCkpt(AdversarialTraining):
    """FGSM-CKPT: the FGSM-RS step, cut short where the network is fooled first (Kim et al., arXiv 2010.01799).

    Samples that are wrong already train on the image itself.
    """

    attack: Attack | None = Checkpoints(attack_mode="eval")
