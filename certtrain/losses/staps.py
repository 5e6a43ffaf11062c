from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..attacks import Attack, Pgd
from ..bounds import Interval, Region
from ..step import Batch, StateSpec, Step
from .base import Ramp, check_share, value_at
from .sabr import small_box
from .taps import Taps


@dataclass(frozen=True)
class Staps(Taps):
    """STAPS (Mao et al., arXiv 2305.04574): TAPS from the small box of SABR.

    Args:
        tau, attack: as in ``Sabr``, the box inside the step's own set.
    """

    tau: float | Ramp = 0.4
    attack: Attack = Pgd(steps=8, step_size=0.25, attack_mode="clean")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("tau", self.tau)

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return self.attack.declare_state(shape, classes)

    def box(self, model: nn.Module, batch: Batch, step: Step) -> Interval | Region:
        images = self.attack(model, batch, step.ball, step).images
        return small_box(step.ball.hull(batch.images), images, value_at(self.tau, step))
