"""Networks that other people trained: their checkpoints become run folders."""

from .checkpoint import import_checkpoint

__all__ = ["import_checkpoint"]
