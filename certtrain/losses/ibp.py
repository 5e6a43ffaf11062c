from dataclasses import dataclass

from torch import Tensor, nn

from ..bounds import Activity, Forward
from ..step import Batch, Step
from .certified import CertifiedLoss, margin_loss, verified_parts


@dataclass(frozen=True)
class Ibp(CertifiedLoss):
    """Plain interval bound propagation (Gowal et al., arXiv 1810.12715): the cross-entropy of the bounds.

    kappa · CE(clean) + (1 - kappa) · L_verified; no attack, batch statistics of the clean pass.
    """

    def clean_gradient(self, step: Step) -> bool:
        return True  # the bounds use the clean pass' statistics, with their gradients

    def robust(self, model: nn.Module, batch: Batch, step: Step, clean: Forward) -> tuple[Tensor, dict, Activity]:
        verified, activity = self.bound(model, batch, step, clean.statistics)
        loss = margin_loss(verified).mean()
        return loss, verified_parts(verified), activity
