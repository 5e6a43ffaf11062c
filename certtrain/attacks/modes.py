"""A model put into a mode for a while; what was changed comes back, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in training or in evaluation mode, and no gradients of weights; modes and flags come back."""
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
    """Running statistics and other buffers come back."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
