"""Import checkpoints of networks trained elsewhere as run folders."""

from .checkpoint import Imported, check_architecture, rebuild
from .layers import layers_of
from .reading import read

__all__ = ["Imported", "check_architecture", "layers_of", "read", "rebuild"]
