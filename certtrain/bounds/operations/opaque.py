"""Functions without bound rules, which can only be evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..interval import Interval
from .base import Folding, Function, Unbounded, UnsupportedOperation


@dataclass(frozen=True, eq=False)
class Opaque(Unbounded):
    """A function that can be evaluated but not bounded; other rules raise ``why``."""

    function: Callable[[Tensor], Tensor]
    why: UnsupportedOperation

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def interval(self, x: Interval) -> Interval:
        raise self.why

    def refusal(self) -> UnsupportedOperation:
        return self.why

    def terms(self, shape: torch.Size) -> int:
        raise self.why

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self.function)

    def fold(self, folding: Folding, *sources: int) -> int:
        return folding.append(replace(self, inputs=sources))
