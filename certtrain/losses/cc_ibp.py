from dataclasses import dataclass

from torch import Tensor

from .certified import ExpressiveLoss, margin_loss, mix


@dataclass(frozen=True)
class CcIbp(ExpressiveLoss):
    """CC-IBP: the cross-entropy of a convex combination of margins (De Palma et al., arXiv 2305.13991).

    mean over the batch of l(alpha · lower bounds + (1 - alpha) · attacked margins), l(z) = log(1 + sum_j e^(-z_j)).
    """

    def combine(self, adversarial: Tensor, verified: Tensor, alpha: float) -> Tensor:
        return margin_loss(mix(adversarial, verified, alpha)).mean()
