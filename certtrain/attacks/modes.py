"""Context managers that set a model's mode and restore it in any case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set all modules to training or evaluation mode, without gradients of weights; restore modes and flags after."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.train(training).requires_grad_(False)
        yield
    finally:
        for module, before in modes.items():
            module.training = before
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore running statistics and other buffers after the block."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
