"""Attacks that change few pixels: of a ``SparseBall``."""

from .spgd import SparsePgd

__all__ = ["SparsePgd"]
