"""What one training step does with a loss."""

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
    """The loss or its gradient is NaN or infinite; ``terms`` are the values of this step. No weight was changed."""

    def __init__(self, terms: dict[str, float]):
        self.terms = terms
        super().__init__(", ".join(f"{name} = {value:g}" for name, value in terms.items()))


@dataclass(frozen=True)
class UpdateRule(Component):
    """Changes the weights once for a global batch that comes in one or more parts."""

    def check_loss(self, loss: Loss) -> None:
        """Refuse, before anything is written, a loss that this rule cannot take apart.

        Raises:
            InputError: names the losses that it takes.
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
        sums = accumulate(optimizer, parts, (loss(model, batch, step) for batch, step in parts))
        result = clipped(model, sums, clip)
        optimizer.step()
        return result


def accumulate(
    optimizer: torch.optim.Optimizer, parts: Sequence[tuple[Batch, Step]], terms: Iterable[LossTerms]
) -> dict[str, Tensor]:
    """Leave in ``.grad`` the gradient of the global batch' loss: that of all parts, and of all processes.

    Args:
        terms: of each part in turn; one is asked for when the backward pass of the one before is done.
    Returns:
        ``loss`` and the loss' named parts, 0-d means over the global batch.
    """
    optimizer.zero_grad()
    exchange = parts[0][1].exchange
    samples = exchange.samples(sum(len(batch) for batch, _ in parts))
    sums: dict[str, Tensor] = {}
    for (batch, _), found in zip(parts, terms, strict=True):
        share = len(batch) / samples
        (found.total * share).backward()
        for name, value in {"loss": found.total.detach(), **found.parts}.items():
            sums[name] = sums.get(name, 0) + value * share
    return exchange.gradient([weight for group in optimizer.param_groups for weight in group["params"]], sums)


def clipped(model: nn.Module, sums: dict[str, Tensor], clip: float | None) -> dict[str, float]:
    """Clip the gradient; ``sums`` and ``gradient_norm`` as numbers.

    Raises:
        NonFinite: the loss or the gradient is not finite.
    """
    limit = float("inf") if clip is None else clip
    sums = {**sums, "gradient_norm": torch.nn.utils.clip_grad_norm_(model.parameters(), limit)}
    # the step's one wait for the device: what is checked is also what is shown
    values = torch.stack([value.double().reshape(()).to(sums["loss"].device) for value in sums.values()]).tolist()
    result = dict(zip(sums, values, strict=True))
    if not all(abs(result[name]) < float("inf") for name in ("loss", "gradient_norm")):
        raise NonFinite(result)
    return result
