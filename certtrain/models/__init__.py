"""Architectures, one file each. Adding one is one file, and one line here."""

from .base import Architecture, Normalise
from .cnn7 import Cnn7
from .initialisation import initialise_for_ibp
from .mlp import Mlp
from .small_cnn import SmallCnn

__all__ = ["Architecture", "Cnn7", "Mlp", "Normalise", "SmallCnn", "initialise_for_ibp"]
