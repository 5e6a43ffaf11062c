"""Checkpoints that other people trained, read and put into our architectures."""

from .checkpoint import Imported, check_architecture, rebuild
from .layers import layers_of
from .reading import read

__all__ = ["Imported", "check_architecture", "layers_of", "read", "rebuild"]
