from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .certified import mix
from .expressive import ExpressiveLoss, mean_margin_loss


@dataclass(frozen=True)
class MtlIbp(ExpressiveLoss):
    """MTL-IBP: the convex combination of the two losses (De Palma et al., arXiv 2305.13991).

    alpha · L_verified + (1 - alpha) · L_adversarial, each a batch mean.
    """

    def combine(
        self, adversarial: Tensor, verified: Tensor, alpha: float, loss: Callable[[Tensor], Tensor] = mean_margin_loss
    ) -> Tensor:
        return mix(loss(adversarial), mean_margin_loss(verified), alpha)
