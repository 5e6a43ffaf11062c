"""Architectures, one file each. Adding one is one file, and one line here."""

from .base import Architecture, Normalise
from .cnn3 import Cnn3
from .cnn5 import Cnn5
from .cnn7 import Cnn7
from .feed_forward import FeedForward
from .gowal import Gowal
from .initialisation import initialise_for_ibp
from .mlp import Mlp
from .resnet import ResNet
from .small_cnn import SmallCnn

__all__ = [
    "Architecture", "Cnn3", "Cnn5", "Cnn7", "FeedForward", "Gowal", "Mlp", "Normalise", "ResNet", "SmallCnn",
    "initialise_for_ibp",
]  # fmt: skip
