"""One step from a perturbation stored for each sample across epochs: the attack of FGSM-PGI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds import NormBall, PerturbationSet
from ..errors import check
from ..step import Batch, StateSpec, Step
from .base import Attack, AttackResult, gradient_of
from .objective import CrossEntropy, Objective, nonzero_start

PRIOR, MOMENTUM = "prior", "prior_momentum"


@dataclass(frozen=True)
class PriorGuided(Attack[NormBall]):
    """x' = Π(x + d + step_size · epsilon · direction(g)), g the gradient at the sample's stored d (arXiv 2207.08859).

    For the sample's next visit d ← Π(d + step_size · epsilon · direction(m)) with m ← g / |g|_1 + momentum · m. In
    every ``reset``-th epoch, the first one included, d is a random corner of an l_inf ball (a random point of an l2
    ball's sphere) and m = 0. Without declared state, in an evaluation, every visit is a first one.

    The stored d belongs to the augmented image and does not move with crops and flips. It is projected into the set
    before use, like every start here; the authors' code passes it unclipped. A visit at epsilon 0, where a ramp begins,
    stores 0: the next one starts at the image, or at a fresh d if the objective is a divergence, which is flat there.

    Its trace holds ``start`` (B, *shape), x + d.

    Args:
        step_size: in epsilons.
        momentum: mu, the factor of the old m.
        reset: epochs between two fresh starts.
        norm: the gradient whose l1 norm is taken: the whole ``batch``'s, as published, so that a sample's momentum
            mixes the scales of its batches (with ``training.accumulate`` of the parts); or each ``sample``'s own.
        objective: the objective to maximise; null for the loss' own.
    """

    needs: ClassVar[type[PerturbationSet]] = NormBall
    step_size: float = 1.0
    momentum: float = 0.3
    reset: int = 40
    norm: Literal["batch", "sample"] = "batch"
    objective: Objective | None = None

    def __post_init__(self) -> None:
        check(self.step_size > 0, "step_size", self.step_size, "a number > 0, in epsilons")
        check(self.momentum >= 0, "momentum", self.momentum, "a number >= 0")
        check(self.reset >= 1, "reset", self.reset, "a number of epochs >= 1")
        check(self.norm in ("batch", "sample"), "norm", self.norm, "batch, sample")

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return {PRIOR: StateSpec("sample", shape), MOMENTUM: StateSpec("sample", shape)}

    def toward(self, objective: Objective) -> PriorGuided:
        return self if self.objective is not None else replace(self, objective=objective)

    def propose(self, model: nn.Module, batch: Batch, ball: NormBall, step: Step) -> AttackResult:
        images = batch.images
        objective = self.objective or CrossEntropy()
        reference = objective.reference(model, batch)
        kept, momentum = PRIOR in step.state.tensors, 0.0

        def fresh() -> Tensor:
            return ball.radius(images) * ball.direction(step.noise.normal(images.shape[1:], "start", images.dtype))

        if kept and step.epoch % self.reset:
            change, momentum = (step.state.read(name, batch).to(images.dtype) for name in (PRIOR, MOMENTUM))
            change = nonzero_start(objective, change, fresh)
        else:
            change = fresh()
        start = ball.project(images, (images + change).clamp(0, 1))
        _, gradient = gradient_of(model, start, lambda logits: objective(logits, reference))

        def moved(along: Tensor) -> Tensor:
            points = start + self.step_size * ball.radius(along) * ball.direction(along)
            return ball.project(images, points.clamp(0, 1))

        if kept:
            momentum = (self._normalised(gradient) + self.momentum * momentum).nan_to_num(0, 0, 0)
            step.state.write(MOMENTUM, batch, momentum)
            step.state.write(PRIOR, batch, moved(momentum) - images)
        return AttackResult(moved(gradient), {"start": start})

    def _normalised(self, gradient: Tensor) -> Tensor:
        sizes = gradient.abs().flatten(1).sum(1)
        size = (sizes.sum() if self.norm == "batch" else sizes).reshape(-1, *[1] * (gradient.ndim - 1))
        return gradient / size.where(size > 0, 1)


@dataclass(frozen=True)
class SmoothedCrossEntropy(Objective):
    """The cross-entropy with a smoothed label: -sum_k t_k log softmax(logits)_k.

    Args:
        true_mass: t at the label; the other classes share the rest evenly. 1 for the plain cross-entropy.
    """

    true_mass: float = 0.6

    def __post_init__(self) -> None:
        check(0 < self.true_mass <= 1, "true_mass", self.true_mass, "a share in (0, 1]")

    def reference(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.labels

    def __call__(self, logits: Tensor, reference: Tensor) -> Tensor:
        own = F.cross_entropy(logits, reference, reduction="none")
        if self.true_mass == 1:
            return own
        others = (-F.log_softmax(logits, 1).sum(1) - own) / (logits.shape[1] - 1)
        return self.true_mass * own + (1 - self.true_mass) * others
