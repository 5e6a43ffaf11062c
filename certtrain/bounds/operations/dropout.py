"""Dropout: random in training, the identity in evaluation mode, which bounds enclose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..interval import Interval
from .base import Folding, Unbounded, UnsupportedOperation
from .options import options, refuse
from .registry import EvaluationMode, Tracing, from_function, from_module


@dataclass(frozen=True, eq=False)
class Dropout(Unbounded):
    """A dropout layer of a model; folding removes it."""

    layer: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def interval(self, x: Interval) -> Interval:
        return x

    def refusal(self) -> UnsupportedOperation:
        return UnsupportedOperation(f"{self.path}: found dropout in linear bounds; accepted: a folded network")

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Identity()

    def fold(self, folding: Folding, *sources: int) -> int:
        return sources[0]


@from_module(nn.Dropout, nn.Dropout1d, nn.Dropout2d)
def _dropout(tracing: Tracing, path: str, source: int, module: nn.Module) -> int:
    return tracing.append(Dropout(path, (source,), module))


@from_function("dropout", "dropout1d", "dropout2d", "feature_dropout")
def _function(tracing: Tracing, node: fx.Node, source: int) -> int:
    share, training, _ = options(tracing, node, p=0.5, training=True, inplace=False)
    if isinstance(training, EvaluationMode):
        return tracing.append(Dropout(node.name, (source,), _Following(node.target, share, training.owner)))
    if training:
        refuse(node, "training=True, which draws in evaluation mode too", "training=self.training, nn.Dropout")
    return source


@dataclass(frozen=True, eq=False)
class _Following:
    """A functional dropout in the mode of the module whose forward calls it."""

    function: Any
    share: float
    owner: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, self.share, self.owner.training)
