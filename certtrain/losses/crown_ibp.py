from dataclasses import dataclass

from torch import Tensor, nn

from ..bounds import Activity, Forward
from ..bounds.crown import bound_forms, interval_bounds
from ..bounds.folding import fold
from ..step import Batch, Step
from .base import Ramp, check_share, value_at
from .certified import CertifiedLoss, _share_positive, margin_loss, margin_rows, mix


@dataclass(frozen=True)
class CrownIbp(CertifiedLoss):
    """CROWN-IBP (Zhang et al., arXiv 1906.06316): one backward pass of linear bounds over interval bounds.

    kappa · CE(clean) + (1 - kappa) · L(beta · m_CROWN-IBP + (1 - beta) · m_IBP), where m are lower bounds of the
    margins and L is their cross-entropy; batch statistics of the clean pass.

    Args:
        beta: the share of the linear bounds, constant or along the ramp; published recipes end in plain intervals.
    """

    beta: float | Ramp = Ramp(1.0, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("beta", self.beta)

    def clean_gradient(self, step: Step) -> bool:
        return True  # the bounds use the clean pass' statistics, with their gradients

    def robust(self, model: nn.Module, batch: Batch, step: Step, clean: Forward) -> tuple[Tensor, dict, Activity]:
        verified, activity = self.bound(model, batch, step, clean.statistics)
        share = value_at(self.beta, step)
        if share > 0:
            network, region = fold(model, batch.images.shape[1:], clean.statistics), step.ball.region(batch.images)
            rows = margin_rows(batch.labels, clean.logits)
            linear = bound_forms(network, region, rows, interval_bounds(network, region))
            verified = mix(verified, linear, share)
        loss = margin_loss(verified).mean()
        return loss, {"verified_loss": loss, "verified_accuracy": _share_positive(verified)}, activity
