"""Import checkpoints of networks trained elsewhere as run folders."""

from .checkpoint import import_checkpoint

__all__ = ["import_checkpoint"]
