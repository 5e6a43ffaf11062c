from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bounds import NormBall
from ..errors import check
from ..step import Batch, StateSpec, Step
from .ascent import Ascent, Start
from .base import Attack, AttackMode, SetT

COUNT = "nuclear_iterations"


@dataclass(frozen=True)
class NuclearNormAttack(Attack[SetT]):
    """Mixin that adds the nuclear norm to the maximised objective in every other iteration.

    The objective is sum CE(f(x'), y) + weight · |f(x') - f(x)|_*, with the norm in the 2nd, 4th, … global batch of a
    training (the count is state of the run) and in every batch where no count is kept. The published code takes f(x) in
    training mode and f(x') in evaluation mode, so that they differ at x' = x; here both use ``attack_mode``.

    Args:
        weight: of the nuclear norm; null for the loss' own, or 0 without a loss that has one.
    """

    weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of the attack that this is mixed into
        check(self.weight is None or self.weight >= 0, "weight", self.weight, "a number >= 0, or null")

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return {COUNT: StateSpec("run", dtype=torch.int64)}

    def maximised(self, model: nn.Module, batch: Batch, step: Step) -> Callable[[Tensor], Tensor]:
        objective: Callable[[Tensor], Tensor] = super().maximised(model, batch, step)  # type: ignore[misc]
        joins, weight = _joins(batch, step), self.weight
        if not joins or weight is None or weight == 0:
            return objective
        with torch.no_grad():
            clean = model(batch.images)
        return lambda logits: objective(logits).sum() + weight * nuclear_norm(logits - clean)


@dataclass(frozen=True)
class Nuclear(NuclearNormAttack[NormBall], Ascent):
    """NuAT's attack: one step of size epsilon from a random corner of half the ball."""

    attack_mode: AttackMode = "eval"
    steps: int = 1
    step_size: float = 1.0
    start: Start = "corners"
    start_scale: float = 0.5


def _joins(batch: Batch, step: Step) -> bool:
    """Count this global batch once, whatever its number of parts; return whether the norm is included."""
    if COUNT not in step.state.specs:
        return True
    count = step.state.read(COUNT, batch)
    if step.state.offset == 0:
        count = count + 1
        step.state.write(COUNT, batch, count)
    return int(count) % 2 == 0  # waits for the device, as the decomposition that it saves would


def nuclear_norm(matrix: Tensor) -> Tensor:
    """The sum of the singular values of (B, K), 0-d, at least in float32.

    It is <matrix, U Vᵀ> over the singular values that are not 0, with U and V constant: the exact gradient where the
    norm has one, and elsewhere its subgradient of least norm. The derivative of the decomposition itself, which divides
    by differences of singular values, is never taken. No second derivatives. NaN where an entry is not finite.
    """
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    with torch.no_grad():
        finite = torch.where(matrix.isfinite(), matrix, 0)  # of others LAPACK raises
        left, values, right = torch.linalg.svd(finite, full_matrices=False)
        least = values[:1] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
        polar = (left * (values > least)) @ right
    return (matrix * polar).sum()
