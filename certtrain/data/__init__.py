"""Data sources, one file each, and the loader. Adding a source is one file, and one line here."""

from .arrays import Arrays
from .dataset import Dataset, Source, Split
from .digits import Digits
from .loader import Augment, Loader, in_order
from .torchvision_files import Cifar10, Mnist

__all__ = ["Arrays", "Augment", "Cifar10", "Dataset", "Digits", "Loader", "Mnist", "Source", "Split", "in_order"]
