from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attacks import Ascent, Attack, AttackResult, CrossEntropy
from ...bounds import PerturbationSet
from ...errors import InputError
from ...step import Batch, Step
from ..base import Ramp, check_least, value_at
from .base import AdversarialTraining, Passes


@dataclass(frozen=True)
class FgsmGa(AdversarialTraining):
    """GradAlign: FGSM with a penalty on input gradients that turn (Andriushchenko and Flammarion, arXiv 2007.02617).

    mean CE(f(x'), y) + weight · mean(1 - cos(g1, g2)), g1 the input gradient at x and g2 that at x + a uniform change.
    Samples with a gradient of 0 (or one whose square underflows) are left out of that mean. Over a sparse set the
    change is random in k random pixels, and weight and attack have no default.

    Args:
        attack: FGSM. Where it starts at the image, with the network in the mode of the training passes, a detached g1
            is the attack's own gradient and costs nothing.
        weight: null for the published 0.02 · 10^(255 epsilon / 8), a fit of l_inf radii up to 16/255: 0.2 at 8/255, 2
            at 16/255, but 31 at 0.1.
        detached: whether g1 is a constant, as in the authors' code. If not, it is recomputed with its graph.
        clipped: whether x + the change is projected into the set within [0, 1]; the authors' code does not.
    """

    attack: Attack = Ascent(attack_mode="train", steps=1, step_size=1.0, start="zero")
    weight: float | Ramp | None = None
    detached: bool = True
    clipped: bool = False

    def __post_init__(self) -> None:
        if self.weight is not None:
            check_least("weight", self.weight)

    @property
    def second_derivatives(self) -> bool:
        return True

    def check_ball(self, ball: PerturbationSet) -> None:
        super().check_ball(ball)
        if self.weight is None and ball.norm != "Linf":
            raise InputError(
                f"loss.weight: found null for {ball.kind}; accepted: a number: the published formula knows "
                "LinfBall alone"
            )

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        passes = super().passes(model, batch, step, found, clean)
        if self.weight == 0:
            return passes
        images = batch.images
        first = found.trace.get("gradient") if self._attack_takes_it else None
        if first is None:
            first = _gradient(model, images, batch.labels, graph=not self.detached)
        points = images + step.ball.sample(images, step.noise, "alignment")
        points = step.ball.project(images, points.clamp(0, 1)) if self.clipped else points
        second = _gradient(model, points, batch.labels, graph=True)
        weight = published_weight(step.ball.epsilon) if self.weight is None else value_at(self.weight, step)
        return replace(passes, penalties={**passes.penalties, "misalignment": weight * misalignment(first, second)})

    @property
    def _attack_takes_it(self) -> bool:
        """Whether the attack's first gradient is g1."""
        attack = self.attack
        if not self.detached or type(attack) is not Ascent:  # a subclass may maximise something else
            return False
        at_image = attack.start == "zero" and attack.attack_mode in ("train", "batch")
        return at_image and attack.objective in (None, CrossEntropy())


def published_weight(epsilon: float | Tensor) -> float | Tensor:
    """exp(e · ln(10) / 8 + ln(0.02)) of e = 255 epsilon, on epsilon's device."""
    return 0.02 * 10 ** (epsilon * 255 / 8)


def misalignment(first: Tensor, second: Tensor) -> Tensor:
    """The mean (0-d) of 1 - cos of two gradients (B, *shape), over the samples with both gradients other than 0."""
    first, second = first.flatten(1), second.flatten(1)
    tiny = torch.finfo(first.dtype).tiny
    directed = (first.detach().square().sum(1) > tiny) & (second.detach().square().sum(1) > tiny)
    # replaced before the norm, whose derivative at 0 is not finite
    first, second = (gradient.where(directed[:, None], 1) for gradient in (first, second))
    cosines = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
    return torch.where(directed, 1 - cosines, 0).sum() / directed.sum().clamp(min=1)


def _gradient(model: nn.Module, points: Tensor, labels: Tensor, graph: bool) -> Tensor:
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        total = F.cross_entropy(model(points), labels, reduction="sum")
        return torch.autograd.grad(total, points, create_graph=graph)[0]
