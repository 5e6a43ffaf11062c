from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .certified import mix
from .expressive import ExpressiveLoss, mean_margin_loss


@dataclass(frozen=True)
class CcIbp(ExpressiveLoss):
    """CC-IBP: the cross-entropy of a convex combination of margins (De Palma et al., arXiv 2305.13991).

    mean over the batch of l(alpha · lower bounds + (1 - alpha) · attacked margins), l(z) = log(1 + sum_j e^(-z_j)).
    With ``adversarial`` the criterion of that method takes the place of l, on adversarial logits that have these
    margins.
    """

    def combine(
        self, adversarial: Tensor, verified: Tensor, alpha: float, loss: Callable[[Tensor], Tensor] = mean_margin_loss
    ) -> Tensor:
        return loss(mix(adversarial, verified, alpha))
