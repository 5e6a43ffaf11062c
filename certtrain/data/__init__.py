"""Data sources, one file each, and the loader. Adding a source is one file, and one line here."""

from .arrays import Arrays
from .dataset import Dataset, Source, Split
from .digits import Digits
from .gtsrb import Gtsrb
from .held_out import HeldOut
from .idx_files import FashionMnist, Mnist
from .imagenet64 import ImageNet64
from .imagenet100 import ImageNet100
from .loader import Augment, Loader, in_order
from .tiny_imagenet import TinyImageNet
from .torchvision_files import Cifar10, Cifar100, Svhn

__all__ = [
    "Arrays", "Augment", "Cifar10", "Cifar100", "Dataset", "Digits", "FashionMnist", "Gtsrb", "HeldOut",
    "ImageNet64", "ImageNet100", "Loader", "Mnist", "Source", "Split", "Svhn", "TinyImageNet", "in_order",
]  # fmt: skip
