"""MNIST and CIFAR-10 in torchvision's folder layout; each file is checked against its published md5 before use."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .dataset import Source, Split


@dataclass(frozen=True)
class TorchvisionFiles(Source):
    """A data set that torchvision knows how to download and to read.

    Args:
        root: torchvision's root folder.
        download: fetch the files if they are not there.
    """

    root: Path = Path("data")
    download: bool = False

    @abstractmethod
    def files(self) -> dict[str, str]:
        """md5 of each file, by path below ``root``."""

    @abstractmethod
    def open(self, train: bool) -> Any:
        """torchvision's data set, which has ``data`` and ``targets``; may download."""

    def read(self) -> tuple[Split, Split, int]:
        if self.download:
            try:
                self.open(train=True)
            except Exception as error:  # torchvision raises what urllib, tarfile or gzip raise
                raise InputError(f"{self.root}: {type(self).__name__} could not be downloaded ({error})") from error
        for name, expected in self.files().items():
            _check_file(self.root / name, expected)
        splits = []
        for train in (True, False):
            stored = self.open(train)
            images = torch.as_tensor(stored.data)
            images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
            splits.append(Split(images, torch.as_tensor(stored.targets).long()))
        return splits[0], splits[1], 10


def _check_file(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path}: no such file; accepted: torchvision's layout, or --data.download true to fetch it"
        ) from error
    if found != expected:
        raise InputError(f"{path}: found md5 {found}; accepted: {expected} (the file is corrupt: fetch it again)")


@dataclass(frozen=True)
class Mnist(TorchvisionFiles):
    """MNIST: 60 000 + 10 000 grey images of 28×28."""

    def files(self) -> dict[str, str]:
        raw = {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        }
        return {f"MNIST/raw/{name}": md5 for name, md5 in raw.items()}

    def open(self, train: bool) -> Any:
        from torchvision.datasets import MNIST

        return MNIST(str(self.root), train=train, download=self.download)


@dataclass(frozen=True)
class Cifar10(TorchvisionFiles):
    """CIFAR-10: 50 000 + 10 000 colour images of 32×32."""

    def files(self) -> dict[str, str]:
        from torchvision.datasets import CIFAR10

        return {f"{CIFAR10.base_folder}/{name}": md5 for name, md5 in CIFAR10.train_list + CIFAR10.test_list}

    def open(self, train: bool) -> Any:
        from torchvision.datasets import CIFAR10

        return CIFAR10(str(self.root), train=train, download=self.download)
