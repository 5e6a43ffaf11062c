from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attacks import AttackResult
from ...bounds import NormBall, PerturbationSet
from ...errors import InputError, check
from ...step import Batch, StateSpec, Step
from .base import Accuracy, AdversarialLoss, Passes

CARRIED = "carried"


@dataclass(frozen=True)
class FreeAt(AdversarialLoss):
    """Free adversarial training: one backward pass for the weights and for the perturbation (Shafahi et al.,
    arXiv 1904.12843).

    mean CE(f(x + d), y), several updates with each batch. Each moves the weights, and d ← Π(d + step_size · epsilon ·
    direction of the *loss'* gradient), whatever that loss is: under QUB d climbs QUB's bound. There is one d for each
    position in the batch, which is never reset: what a batch leaves is where the next one starts, and a smaller last
    batch uses the first rows. x + d is brought into the set before it is passed.

    Args:
        replays: m, updates with each batch; an epoch has that many times the steps, so recipes have fewer epochs.
        step_size: in epsilons.
    """

    replays: int = 8  # type: ignore[override]
    step_size: float = 1.0

    def __post_init__(self) -> None:
        check(self.replays >= 1, "replays", self.replays, "a whole number >= 1")
        check(self.step_size > 0, "step_size", self.step_size, "a number > 0, in epsilons")

    def check_ball(self, ball: PerturbationSet) -> None:
        if not isinstance(ball, NormBall):
            raise InputError(f"loss.type FreeAt: found a {type(ball).__name__}; accepted: the ball of a norm")

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return {CARRIED: StateSpec("position", shape)}

    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> AttackResult:
        images = batch.images.detach()
        if CARRIED not in step.state.tensors:
            return AttackResult(images)
        change = step.state.read(CARRIED, batch).to(images.dtype)
        return AttackResult(step.ball.project(images, (images + change).clamp(0, 1)))

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        points = found.images.detach().requires_grad_(torch.is_grad_enabled())
        if points.requires_grad and CARRIED in step.state.tensors:
            points.register_hook(partial(self._carry, batch, step, points.detach()))
        return Passes(batch.labels, model(points), clean, points)

    def criterion(self, passes: Passes, step: Step, accuracy: Accuracy | None = None) -> Tensor:
        if accuracy is not None:
            return accuracy(passes, step).mean()
        return F.cross_entropy(passes.adversarial, passes.labels)

    def _carry(self, batch: Batch, step: Step, points: Tensor, gradient: Tensor) -> None:
        """Write what the next update starts from; called by the backward pass."""
        assert isinstance(step.ball, NormBall)
        images = batch.images.detach()
        moved = points + self.step_size * step.ball.epsilon * step.ball.direction(gradient)
        change = step.ball.project(images, moved.clamp(0, 1)) - images
        step.state.write(CARRIED, batch, change.nan_to_num(0, 0, 0))
