"""Averages along training: of weights, and of batch-norm statistics over a whole epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..bounds import forward
from ..errors import check
from ..step import Batch

Norm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True)
class Averaging:
    """Stochastic weight averaging (Izmailov et al., arXiv 1803.05407): the result is the mean of the weights.

    Args:
        start: number of epochs after which averaging begins.
        every: steps between two averaged weights.
    """

    start: int
    every: int = 10

    def __post_init__(self) -> None:
        check(self.start >= 0, "start", self.start, "a number of epochs >= 0")
        check(self.every >= 1, "every", self.every, "a number of steps >= 1")


class WeightAverage:
    """The running mean of a model's parameters; does nothing without ``settings``."""

    def __init__(self, model: nn.Module, settings: Averaging | None, steps_per_epoch: int):
        self.settings, self.steps_per_epoch = settings, steps_per_epoch
        self.mean = None if settings is None else AveragedModel(model)

    def update(self, model: nn.Module, steps: int) -> None:
        """Include the weights after ``steps`` steps of training, if the settings say so."""
        if self.mean is None or self.settings is None:
            return
        if steps > self.settings.start * self.steps_per_epoch and steps % self.settings.every == 0:
            self.mean.update_parameters(model)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> bool:
        """Copy the mean into the model and return whether there is one. Batch statistics still belong to the earlier
        weights."""
        if self.mean is None or not int(self.mean.n_averaged):
            return False
        for own, mean in zip(model.parameters(), self.mean.module.parameters(), strict=True):
            own.copy_(mean)
        return True

    def state(self) -> Mapping[str, Any]:
        return {} if self.mean is None else self.mean.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        if self.mean is not None:
            self.mean.load_state_dict(state)


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Set the running statistics of all batch norms to their mean over ``batches`` of clean images, weighted by size
    ("precise" batch norm, Wu and Johnson, arXiv 2105.07576). The model must be in training mode."""
    norms = [module for module in model.modules() if isinstance(module, Norm)]
    if not norms:
        return
    momenta, seen = [norm.momentum for norm in norms], 0
    try:
        for batch in batches:
            seen += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / seen  # 1 for the first batch: earlier statistics are dropped
            forward(model, batch.images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
