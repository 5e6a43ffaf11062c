"""Rules for updating the weights in one training step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Component
from ..errors import Portable
from ..losses import Loss, LossTerms
from ..step import Batch, Step


class NonFinite(Portable, ArithmeticError):
    """The loss or its gradient is NaN or infinite. ``terms`` are the values of the step; no weight was changed."""

    def __init__(self, terms: dict[str, float]):
        self.terms = terms
        super().__init__(", ".join(f"{name} = {value:g}" for name, value in terms.items()))


@dataclass(frozen=True)
class UpdateRule(Component):
    """A rule that updates the weights once for a global batch, given in one or more parts."""

    def check_loss(self, loss: Loss) -> None:
        """Refuse a loss that this rule does not support, before anything is written.

        Raises:
            InputError: names the supported losses.
        """

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        parts: Sequence[tuple[Batch, Step]],
        clip: float | None,
    ) -> dict[str, float]:
        """Update the weights.

        Returns:
            ``loss``, ``gradient_norm`` and the loss' named parts, means over the global batch.
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
        sums = accumulate(optimizer, parts, (loss(model, batch, step) for batch, step in parts))
        result = clipped(model, sums, clip)
        optimizer.step()
        return result


def accumulate(
    optimizer: torch.optim.Optimizer, parts: Sequence[tuple[Batch, Step]], terms: Iterable[LossTerms]
) -> dict[str, Tensor]:
    """Set ``.grad`` to the gradient of the loss over the global batch, summed over all parts and processes.

    Args:
        terms: loss terms of each part; each is computed after the backward pass of the one before.
    Returns:
        ``loss`` and the loss' named parts, 0-d means over the global batch.
    """
    optimizer.zero_grad()
    exchange = parts[0][1].exchange
    samples = exchange.samples(sum(len(batch) for batch, _ in parts))
    sums: dict[str, Tensor] = {}
    for (batch, _), term in zip(parts, terms, strict=True):
        share = len(batch) / samples
        (term.total * share).backward()
        for name, value in {"loss": term.total.detach(), **term.parts}.items():
            sums[name] = sums.get(name, 0) + value * share
    return exchange.gradient([weight for group in optimizer.param_groups for weight in group["params"]], sums)


def clipped(model: nn.Module, sums: dict[str, Tensor], clip: float | None) -> dict[str, float]:
    """Clip the gradient and return ``sums`` and ``gradient_norm`` as numbers.

    Raises:
        NonFinite: the loss or the gradient is not finite.
    """
    limit = float("inf") if clip is None else clip
    sums = {**sums, "gradient_norm": torch.nn.utils.clip_grad_norm_(model.parameters(), limit)}
    # the only wait of a step for its device: the same values are checked and displayed
    values = torch.stack([value.double().reshape(()).to(sums["loss"].device) for value in sums.values()]).tolist()
    result = dict(zip(sums, values, strict=True))
    if not all(abs(result[name]) < float("inf") for name in ("loss", "gradient_norm")):
        raise NonFinite(result)
    return result
