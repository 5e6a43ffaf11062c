"""Frank and Wolfe's ascent: an attack that needs only the maximum of a linear form over the set."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..bounds import PerturbationSet
from ..errors import check
from ..step import Batch, Step
from .base import Attack, AttackResult, gradient_of
from .objective import CrossEntropy, Objective


@dataclass(frozen=True)
class FrankWolfe(Attack[PerturbationSet]):
    """x' ← x' + 2 / (t + 2) · (s - x') for t = 0, 1, …, from the image on, where s maximises the objective's
    linearisation at x' over the whole ball, cut to [0, 1] (Frank and Wolfe 1956).

    One step is the exact maximum of the linearised loss; in an l_inf ball it is FGSM. There is no step size, and budget
    that a pixel at an end of [0, 1] cannot use goes to other pixels. This is the attack for an l1 ball, where a step
    along the gradient moves one pixel, even one at an end of [0, 1].

    Args:
        steps: number of gradients.
        objective: the objective to maximise; null for the loss' own, the cross-entropy for most.
    """

    steps: int = 20
    objective: Objective | None = None

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, "a whole number >= 1")

    def toward(self, objective: Objective) -> FrankWolfe:
        return self if self.objective is not None else replace(self, objective=objective)

    def propose(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> AttackResult:
        objective = self.objective or CrossEntropy()
        reference, points = objective.reference(model, batch), batch.images
        for number in range(self.steps):
            _, gradient = gradient_of(model, points, lambda z: objective(z, reference))
            points = points + 2 / (number + 2) * (farthest(ball, batch.images, gradient) - points)
        return AttackResult(points)


def farthest(ball: PerturbationSet, images: Tensor, gradient: Tensor) -> Tensor:
    """The maximiser (B, *shape) of <gradient, x'> over each image's set, as the derivative of ``concretise``."""
    forms = gradient.detach().neg().unsqueeze(1).requires_grad_()
    with torch.enable_grad():
        least = ball.concretise(forms, images).sum()
    return torch.autograd.grad(least, forms)[0].squeeze(1)
