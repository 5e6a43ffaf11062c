from dataclasses import dataclass

from torch import Tensor

from .certified import ExpressiveLoss, margin_loss, mix


@dataclass(frozen=True)
class MtlIbp(ExpressiveLoss):
    """MTL-IBP: the convex combination of the two losses (De Palma et al., arXiv 2305.13991).

    alpha · L_verified + (1 - alpha) · L_adversarial, each a batch mean.
    """

    def combine(self, adversarial: Tensor, verified: Tensor, alpha: float) -> Tensor:
        return mix(margin_loss(adversarial).mean(), margin_loss(verified).mean(), alpha)
