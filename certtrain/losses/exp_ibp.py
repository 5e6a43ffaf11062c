from dataclasses import dataclass

from torch import Tensor

from .certified import ExpressiveLoss, margin_loss, mix


@dataclass(frozen=True)
class ExpIbp(ExpressiveLoss):
    """Exp-IBP: the geometric combination of the two batch means (De Palma et al., arXiv 2305.13991).

    L_verified^alpha · L_adversarial^(1 - alpha), computed in logarithms: in float32 a cross-entropy is exactly 0
    from a margin of about 17 on, where the power's own derivative is NaN. ``FLOOR`` bounds both losses from below.
    """

    def combine(self, adversarial: Tensor, verified: Tensor, alpha: float) -> Tensor:
        losses = margin_loss(adversarial).mean(), margin_loss(verified).mean()
        if alpha in (0, 1):
            return mix(*losses, alpha)
        attacked, bounded = (loss.clamp(min=FLOOR).log() for loss in losses)
        return mix(attacked, bounded, alpha).exp()


FLOOR = 1e-12
