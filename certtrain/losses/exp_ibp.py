from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import check
from .certified import mix
from .expressive import ExpressiveLoss, mean_margin_loss


@dataclass(frozen=True)
class ExpIbp(ExpressiveLoss):
    """Exp-IBP: the geometric combination of the two batch means (De Palma et al., arXiv 2305.13991).

    L_verified^alpha · L_adversarial^(1 - alpha), computed in logarithms: in float32 a cross-entropy is exactly 0
    from a margin of about 17 on, where the power's own derivative is NaN. ``FLOOR`` bounds both losses from below.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        bounded = self.adversarial is None or not self.adversarial.may_be_negative
        check(bounded, "adversarial", type(self.adversarial).__name__, "a method whose loss is never negative")

    def combine(
        self, adversarial: Tensor, verified: Tensor, alpha: float, loss: Callable[[Tensor], Tensor] = mean_margin_loss
    ) -> Tensor:
        losses = loss(adversarial), mean_margin_loss(verified)
        if alpha in (0, 1):
            return mix(*losses, alpha)
        attacked, bounded = (value.clamp(min=FLOOR).log() for value in losses)
        return mix(attacked, bounded, alpha).exp()


FLOOR = 1e-12
