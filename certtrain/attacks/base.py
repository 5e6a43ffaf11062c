"""The base of attacks: subclasses propose points, the base class guarantees where they lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, final

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from ..bounds import PerturbationSet, forward
from ..bounds.clock import look
from ..config import Component
from ..errors import InputError
from ..labels import check_logits, classes_of
from ..step import Batch, StateSpec, Step
from .modes import buffers_kept, in_mode
from .objective import Objective

AttackMode = Literal["train", "eval", "batch", "clean"]
SetT = TypeVar("SetT", bound=PerturbationSet, default=Any)


@dataclass(frozen=True)
class AttackResult:
    """Perturbed images (B, *shape), detached, and the trace that the attack records, by name."""

    images: Tensor
    trace: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Attack(Component, Generic[SetT]):
    """A configured attack: ``Pgd(steps=8)(model, batch, ball, step)``. ``Attack[NormBall]`` attacks the balls of norms.

    For any proposal the result lies in ``allowed(ball)`` and in that set's hull, holds no
    gradient, and leaves the model as it was: parameters, their ``.grad`` and ``requires_grad``, training
    flags, and buffers (except under ``attack_mode: train``).

    Args:
        attack_mode: the model's mode during the attack. ``eval``: running batch statistics; ``train``: the
            batch's, updating the running ones; ``batch``: the batch's, running ones untouched; ``clean``: those of
            the images before the attack, running ones untouched (one forward pass more).
    """

    needs: ClassVar[type[PerturbationSet]] = PerturbationSet
    """The kind of set that it needs, an abstract one as a rule: ``NormBall`` for a radius and a direction."""

    takes_gradients: ClassVar[bool] = True
    """Whether the attack uses gradients; a black-box attack sees logits only and counts ``queries`` (B,) in its
    trace."""

    attack_mode: AttackMode = "eval"

    def check_ball(self, ball: PerturbationSet, where: str = "attack", among: type[Attack] | None = None) -> None:
        """
        Args:
            among: which family of attacks the error names; all by default.
        Raises:
            InputError: the attack does not support sets of this kind; names attacks that do.
        """
        if not self.needs.matches(ball):
            kinds = (among or Attack).members().values()
            known = ", ".join(kind.__name__ for kind in kinds if kind.needs.matches(ball))
            raise InputError(f"{where}.type: found {type(self).__name__} for a {ball.kind}; accepted: {known}")

    def allowed(self, ball: PerturbationSet) -> PerturbationSet:
        """The set that the result lies in: the ball, or a wider set that the attack declares."""
        return ball

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        """State kept across batches, by name, for images of ``shape`` and this number of classes; none by default."""
        return {}

    def toward(self, objective: Objective) -> Attack[SetT]:
        """This attack with the objective of the loss that it serves; itself where it has its own."""
        return self

    @abstractmethod
    def propose(self, model: nn.Module, batch: Batch, ball: SetT, step: Step) -> AttackResult:
        """Candidates inside ``allowed(ball)``; gradients may be taken of the images only."""

    @final
    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> AttackResult:
        """Attack a batch.

        Args:
            model: maps (B, *shape) in [0, 1] to logits (B, K).
            ball: the set around ``batch.images``; ``step.noise`` supplies random numbers.
        Raises:
            InputError: see ``check_ball``; images that have no such set: see ``PerturbationSet.region``; an attack by
                gradients on a model that has none; logits that are not those of two classes or more; labels on the CPU
                that are no classes.
        """
        self.check_ball(ball)
        ball.region(batch.images)  # which says what it cannot be around
        known: Any = ball  # of the kind that it needs
        batch = replace(batch, images=batch.images.detach())
        wide = self.allowed(ball)
        if len(batch) == 0:
            return AttackResult(batch.images)
        kept = nullcontext() if self.attack_mode == "train" else buffers_kept(model)
        with in_mode(model, self.attack_mode != "eval"), kept, torch.set_grad_enabled(self.takes_gradients):
            plain = model.model if isinstance(model, _Judged) else model  # of an attack within an attack
            attacked = _Frozen(plain, batch.images) if self.attack_mode == "clean" else plain
            proposed = self.propose(_Judged(attacked, batch.labels), batch, known, step)
        proposal = proposed.images.detach()
        valid = torch.where(proposal.isnan(), batch.images, proposal).clamp(0, 1)
        images = wide.project(batch.images, valid)
        hull = wide.hull(batch.images)
        return AttackResult(images.clamp(hull.lower, hull.upper), proposed.trace)


def gradient_of(model: nn.Module, points: Tensor, objective: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The model's logits at ``points``, detached, and the gradient there of the sum of ``objective(logits)``."""
    look()
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(points)
        if not logits.requires_grad:
            raise InputError(
                "model: found logits without gradients in the images; accepted: a network that is differentiable, or "
                "an attack that takes none (SparseRs, CornerSearch)"
            )
        total = objective(logits).sum()
    (gradient,) = torch.autograd.grad(total, points)
    return logits.detach(), gradient


class _Judged(nn.Module):
    """A model whose outputs are checked to be logits for these labels."""

    def __init__(self, model: nn.Module, labels: Tensor):
        super().__init__()
        self.model = model
        self.labels: Tensor | None = labels  # until they have been looked at

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if self.labels is None:
            classes_of(logits)
        else:
            check_logits(logits, self.labels)
        self.labels = None
        return logits


class _Frozen(nn.Module):
    """A model whose batch norms use the statistics of fixed images for any input."""

    def __init__(self, model: nn.Module, images: Tensor):
        super().__init__()
        self.model = model
        with torch.no_grad():
            self.statistics = forward(model, images).statistics

    def forward(self, x: Tensor) -> Tensor:
        return forward(self.model, x, self.statistics).logits
