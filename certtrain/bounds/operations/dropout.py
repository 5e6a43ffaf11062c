"""Dropout: random in training, the identity in evaluation mode, which bounds enclose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..interval import Interval
from .base import Folding, Unbounded, UnsupportedOperation
from .registry import Tracing, from_function, from_module


@dataclass(frozen=True, eq=False)
class Dropout(Unbounded):
    """A dropout layer of a model; folding removes it."""

    layer: nn.Module

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


@from_function("dropout")
def _function(tracing: Tracing, node: fx.Node, source: int) -> int:
    raise UnsupportedOperation(f"F.dropout at {node.name!r} freezes its mode when traced; accepted: nn.Dropout")
