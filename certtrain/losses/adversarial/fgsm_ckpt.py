from dataclasses import dataclass

from ...attacks import Attack, Checkpoints
from .base import AdversarialTraining


@dataclass(frozen=True)
class FgsmCkpt(AdversarialTraining):
    """FGSM-CKPT: the FGSM-RS step, shortened to the first checkpoint that is misclassified (Kim et al., arXiv
    2010.01799).

    Samples that are misclassified without an attack are trained on unchanged.
    """

    attack: Attack | None = Checkpoints(attack_mode="eval")
