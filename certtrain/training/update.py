"""What one training step does with a loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..config import Component
from ..losses import Loss
from ..step import Batch, Step


class NonFinite(ArithmeticError):
    """The loss or its gradient is NaN or infinite; ``terms`` are the values of this step. No weight was changed."""

    def __init__(self, terms: dict[str, float]):
        self.terms = terms
        super().__init__(", ".join(f"{name} = {value:g}" for name, value in terms.items()))


@dataclass(frozen=True)
class UpdateRule(Component):
    """Changes the weights once for a global batch that comes in one or more parts."""

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        parts: Sequence[tuple[Batch, Step]],
        clip: float | None,
    ) -> dict[str, float]:
        """Returns ``loss``, ``gradient_norm`` and the loss' named parts, means over the global batch.

        Raises:
            NonFinite: before any weight is changed.
        """


@dataclass(frozen=True)
class Descend(UpdateRule):
    """Forward, backward, clip, step."""

    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        parts: Sequence[tuple[Batch, Step]],
        clip: float | None,
    ) -> dict[str, float]:
        optimizer.zero_grad()
        count = sum(len(batch) for batch, _ in parts)
        sums: dict[str, torch.Tensor] = {}
        for batch, step in parts:
            share = len(batch) / count
            terms = loss(model, batch, step)
            (terms.total * share).backward()
            for name, value in {"loss": terms.total.detach(), **terms.parts}.items():
                sums[name] = sums.get(name, 0) + value * share
        limit = float("inf") if clip is None else clip
        sums["gradient_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        # the step's one wait for the device: what is checked is also what is shown
        values = torch.stack([value.double().reshape(()).to(sums["loss"].device) for value in sums.values()]).tolist()
        result = dict(zip(sums, values, strict=True))
        if not all(abs(result[name]) < float("inf") for name in ("loss", "gradient_norm")):
            raise NonFinite(result)
        optimizer.step()
        return result
