from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attacks import AttackResult, SparsePgd
from ...attacks.sparse.spgd import Walk
from ...bounds import NormBall, PerturbationSet, SparseBall
from ...errors import InputError, check
from ...step import Batch, StateSpec, Step
from .base import Accuracy, AdversarialLoss, Passes

CARRIED = "carried"
LOGITS = "carried_logits"
SPARSE = "{type: SparsePgd, steps: 1, alpha: 1, beta: 1, patience: null, keep: last}"


@dataclass(frozen=True)
class FreeAt(AdversarialLoss):
    """Free adversarial training: one backward pass for the weights and for the perturbation (Shafahi et al.,
    arXiv 1904.12843).

    mean CE(f(x + d), y), several updates with each batch. Each moves the weights, and d ← Π(d + step_size · epsilon ·
    direction of the *loss'* gradient), whatever that loss is: under QUB d ascends QUB's bound. There is one d for each
    position in the batch. It is never reset: the next batch starts from it, and a smaller last batch uses the first
    rows. x + d is projected into the set before the pass.

    Over a sparse set x + d is sPGD's x + p ⊙ M, and the update moves p and the logits of M along the loss' gradient;
    both are kept by position and clipped to the range that the new image allows. A position's first start is random,
    because logits do not move while all magnitudes are 0. This form is ours: the source names Free-AT over its l0
    attack without details (Zhong et al., NeurIPS 2025).

    Args:
        replays: m, updates with each batch; an epoch has m times the steps, so recipes have fewer epochs.
        step_size: in epsilons.
        attack: null for the ball of a norm; over a sparse set the update of each replay, ``{type: SparsePgd, steps: 1,
            alpha: 1, beta: 1, patience: null, keep: last}``.
    """

    replays: int = 8  # type: ignore[override]
    step_size: float = 1.0
    attack: SparsePgd | None = None

    def __post_init__(self) -> None:
        check(self.replays >= 1, "replays", self.replays, "a whole number >= 1")
        check(self.step_size > 0, "step_size", self.step_size, "a number > 0, in epsilons")
        if (attack := self.attack) is not None:
            check(type(attack) is SparsePgd, "attack.type", type(attack).__name__, "SparsePgd")
            check(attack.steps == 1, "attack.steps", attack.steps, "1: a replay is a step")
            check(attack.patience is None, "attack.patience", attack.patience, "null: replays are counted nowhere")
            check(attack.keep == "last", "attack.keep", attack.keep, "last: there is no other point")
            check(attack.objective is None, "attack.objective", attack.objective, "null: the loss itself is climbed")

    def check_ball(self, ball: PerturbationSet) -> None:
        wanted = "null" if NormBall.matches(ball) else SPARSE if SparseBall.matches(ball) else None
        if wanted is None:
            found = f"found {ball.kind} for perturbation"
            raise InputError(f"loss.type FreeAt: {found}; accepted: a norm's ball, SparseBall")
        if (self.attack is None) != (wanted == "null"):
            found = "null" if self.attack is None else type(self.attack).__name__
            raise InputError(f"loss.attack: found {found} for a {ball.kind}; accepted: {wanted}")

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        carried = StateSpec("position", shape)
        return {CARRIED: carried} if self.attack is None else {CARRIED: carried, LOGITS: carried}

    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> AttackResult:
        if self.attack is not None:
            return self._started(self.attack, batch, step)
        images = batch.images.detach()
        if CARRIED not in step.state.tensors:
            return AttackResult(images)
        change = step.state.read(CARRIED, batch).to(images.dtype)
        return AttackResult(step.ball.project(images, (images + change).clamp(0, 1)))

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        points = found.images.detach().requires_grad_(torch.is_grad_enabled())
        if points.requires_grad and CARRIED in step.state.tensors:
            if self.attack is None:
                points.register_hook(partial(self._carry, batch, step, points.detach()))
            else:
                points.register_hook(partial(self._carry_sparse, self.attack, batch, step, found.trace))
        return Passes(batch.labels, model(points), clean, points)

    def criterion(self, passes: Passes, step: Step, accuracy: Accuracy | None = None) -> Tensor:
        if accuracy is not None:
            return accuracy(passes, step).mean()
        return F.cross_entropy(passes.adversarial, passes.labels)

    def _carry(self, batch: Batch, step: Step, points: Tensor, gradient: Tensor) -> None:
        """Write what the next update starts from; called by the backward pass."""
        ball, images = NormBall.of(step.ball), batch.images.detach()
        moved = points + self.step_size * ball.radius(gradient) * ball.direction(gradient)
        change = ball.project(images, moved.clamp(0, 1)) - images
        step.state.write(CARRIED, batch, change.nan_to_num(0, 0, 0))

    def _started(self, attack: SparsePgd, batch: Batch, step: Step) -> AttackResult:
        """Where sPGD stands at these positions, with its ``magnitudes`` and ``mask_logits`` in the trace."""
        ball, shape = SparseBall.of(step.ball), batch.images.shape[1:]
        walk = attack.begin(replace(batch, images=batch.images.detach()), ball, step)
        if CARRIED in step.state.tensors:
            p, m = (ball.grouped(step.state.read(name, batch).to(walk.p.dtype)) for name in (CARRIED, LOGITS))
            known = ((p != 0) | (m != 0)).flatten(1).any(1)
            p = torch.minimum(torch.maximum(p, -walk.center), 1 - walk.center)
            p, m = torch.where(known[:, None, None], p, walk.p), torch.where(known[:, None], m[:, 0], walk.m)
            walk = Walk.starting(walk.center, p, m, walk.k, walk.noise)
        trace = {"magnitudes": walk.p, "mask_logits": walk.m}
        return AttackResult(ball.ungrouped(walk.points, shape), trace)

    def _carry_sparse(
        self, attack: SparsePgd, batch: Batch, step: Step, start: Mapping[str, Tensor], gradient: Tensor
    ) -> None:
        """As ``_carry``, of what sPGD keeps; a unit's logit stands at each of its numbers."""
        ball, shape = SparseBall.of(step.ball), batch.images.shape[1:]
        center = ball.grouped(batch.images.detach())
        walk = Walk.starting(center, start["magnitudes"], start["mask_logits"], ball.counts(center), step.noise)
        walk = attack.moved(walk, ball.grouped(gradient), attack.is_projected(step), 0)
        step.state.write(CARRIED, batch, ball.ungrouped(walk.p, shape))
        step.state.write(LOGITS, batch, ball.ungrouped(walk.m.unsqueeze(1).expand_as(walk.p), shape))
