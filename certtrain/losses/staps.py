from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..attacks import Attack, Pgd, default_attack
from ..bounds import Interval, PerturbationSet, Region
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
    attack: Attack | None = Pgd(steps=8, step_size=0.25, attack_mode="clean")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("tau", self.tau)

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return {} if self.attack is None else self.attack.declare_state(shape, classes)

    def attack_over(self, ball: PerturbationSet) -> Attack:
        return self.attack or default_attack(ball, "certified_training")

    def box(self, model: nn.Module, batch: Batch, step: Step) -> Interval | Region:
        images = self.attack_over(step.ball)(model, batch, step.ball, step).images
        return small_box(step.ball.hull(batch.images), images, value_at(self.tau, step))
