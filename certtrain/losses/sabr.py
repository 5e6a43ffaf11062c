from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..attacks import Attack, Pgd
from ..bounds import Activity, Forward, Interval, NormBall, PerturbationSet
from ..config import added
from ..errors import InputError, check
from ..step import Batch, Step
from .base import Ramp, check_share, value_at
from .certified import AttackedLoss, attacked_parts, margin_loss, margins_of, verified_parts


@dataclass(frozen=True)
class Sabr(AttackedLoss):
    """SABR (Müller et al., arXiv 2210.04871): interval bounds of a small box around an adversarial example.

    kappa · CE(clean) + (1 - kappa) · mean of l(lower bounds over the box). The box has ``tau`` times the width of the
    surrounding set and is shifted to lie inside it. A set that is no box, such as ``L2Ball``, is replaced by the box
    around it.

    Args:
        tau: the box's width divided by the set's, constant or along the ramp.
        half_width: of the box in each pixel. ``clipped``, tau times that of the set cut to [0, 1], as in CTBench: with
            tau = 1 it is that set, and the loss that of ``Ibp``. Or ``epsilon``, tau · epsilon everywhere, as in the
            code of SABR, expressive-losses and CTRAIN: a wider box where pixels are cut, on MNIST in nine of ten; with
            tau above 1/2 it leaves the set there, below an upper end that is cut, and is cut to [0, 1] itself.
        confine: the surrounding set: the step's ``ball``, or the ``attacked`` set (they differ where
            ``attack_epsilon_factor`` is not 1; arXiv 2305.13991's code takes the second).
        shrink: multiplies the upper end of each ReLU's input that may have either sign (0.8 in arXiv 2210.04871's
            2/255 recipe).
    """

    attack: Attack | None = Pgd(steps=8, step_size=0.5)
    tau: float | Ramp = 0.4
    confine: Literal["ball", "attacked"] = "ball"
    shrink: float = 1.0
    half_width: Literal["clipped", "epsilon"] = added("clipped")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("tau", self.tau)
        check(0 < self.shrink <= 1, "shrink", self.shrink, "a number in (0, 1]")
        check(self.half_width in ("clipped", "epsilon"), "half_width", self.half_width, "clipped, epsilon")

    def check_ball(self, ball: PerturbationSet) -> None:
        super().check_ball(ball)
        if self.half_width == "epsilon" and not NormBall.matches(ball):
            raise InputError(f"loss.half_width: found epsilon for a {ball.kind}, whose size is none; accepted: clipped")

    def robust(self, model: nn.Module, batch: Batch, step: Step, clean: Forward) -> tuple[Tensor, dict, Activity]:
        images = self.attacked(model, batch, step)
        with torch.set_grad_enabled(self.bn_mode == "adv"):  # only its batch statistics are used
            adversarial = self.adversarial_pass(model, images, clean)
        outer = step.ball if self.confine == "ball" else step.ball.scaled(self.attack_epsilon_factor)
        tau = value_at(self.tau, step)
        if self.half_width == "clipped":
            box = small_box(outer.hull(batch.images), images, tau)
        else:
            box = box_of_radius(outer.hull(batch.images), images, tau * NormBall.of(outer).epsilon)
        verified, activity = self.bound(model, batch, step, adversarial.statistics, box, self.shrink)
        parts = attacked_parts(margins_of(adversarial.logits, batch.labels)) | verified_parts(verified)
        return margin_loss(verified).mean(), parts, activity


def small_box(hull: Interval, images: Tensor, share: float) -> Interval:
    """The box with ``share`` of the hull's radius, inside the hull, that is nearest to ``images``; the hull at share 1.

    A box of constant radius would leave the hull where pixels are clipped to [0, 1] and the share is above 1/2.
    """
    room = (1 - share) * hull.radius
    offset = (images - hull.center).clamp(-room, room)
    return Interval(hull.center + offset, share * hull.radius)


def box_of_radius(hull: Interval, images: Tensor, radius: float | Tensor) -> Interval:
    """The box of one radius in all pixels, cut to [0, 1], around the point nearest to ``images`` from which it does
    not pass the hull; where the hull is narrower than the box, it ends at the hull's upper end."""
    center = torch.minimum(torch.maximum(images, hull.lower + radius), hull.upper - radius)
    return Interval.from_bounds((center - radius).clamp(min=0), (center + radius).clamp(max=1))
