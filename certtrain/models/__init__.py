"""Architectures, one file each. Adding one is one file, and one line here."""

from .base import Architecture, Normalise
from .binary import BinaryScore
from .cifar_resnet import CifarResNet
from .cnn3 import Cnn3
from .cnn5 import Cnn5
from .cnn7 import Cnn7
from .feed_forward import FeedForward
from .flc import FrequencyLowCut
from .gowal import Gowal
from .imagenet_resnet import ImageNetResNet
from .initialisation import HE, initialise_for_ibp, initialise_he, zero_branches
from .mlp import Mlp
from .preact_resnet import PreActResNet
from .resnet import ResNet
from .senet import SeNet
from .shufflenet import ShuffleNetV2
from .small_cnn import SmallCnn
from .vgg import Vgg
from .vit import Vit
from .wide_resnet import WideResNet

__all__ = [
    "HE", "Architecture", "BinaryScore", "CifarResNet", "Cnn3", "Cnn5", "Cnn7", "FeedForward", "FrequencyLowCut",
    "Gowal", "ImageNetResNet", "Mlp", "Normalise", "PreActResNet", "ResNet", "SeNet", "ShuffleNetV2", "SmallCnn", "Vgg",
    "Vit", "WideResNet", "initialise_for_ibp", "initialise_he", "zero_branches",
]  # fmt: skip
