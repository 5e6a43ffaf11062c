"""Shares by which the passes of a step move the running statistics of batch norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

Passed = Literal["clean", "adversarial"]
"""The images of a training pass."""


def equal_momenta(order: Sequence[Passed], passed: Sequence[Passed], momentum: float) -> list[float]:
    """The momentum of each pass in ``passed``, every kind once, with which they move running statistics as the passes
    in ``order`` would with ``momentum``.

    A pass of weight w in the result needs w divided by what the passes behind it leave of the earlier statistics.
    """
    ends = range(len(order) - 1, -1, -1)
    weights = [
        sum(momentum * (1 - momentum) ** end for kind, end in zip(order, ends, strict=True) if kind == own)
        for own in passed
    ]
    left, momenta = 1.0, []
    for weight in reversed(weights):
        momenta.append(weight / left if left > 0 else 0.0)
        left -= weight
    return momenta[::-1]


@contextmanager
def moving(model: nn.Module, order: Sequence[Passed], passed: Sequence[Passed], kind: Passed) -> Iterator[None]:
    """Set the momenta of batch norms for the pass of ``kind``, one of ``passed``, to those that amount to ``order``;
    an empty ``order`` leaves them. Batch norms that average over all batches (momentum None) are left, too."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))] if order else []
    before = [norm.momentum for norm in norms]
    try:
        for norm, momentum in zip(norms, before, strict=True):
            if momentum is not None:
                norm.momentum = equal_momenta(order, passed, momentum)[list(passed).index(kind)]
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
