"""CIFAR and SVHN in torchvision's folder layout, each file checked against its published md5 before use."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..locking import exclusive
from .dataset import Source, Split
from .download import fetch, md5_of


@dataclass(frozen=True)
class TorchvisionFiles(Source):
    """A data set in the files that torchvision downloads.

    Args:
        root: torchvision's root folder.
        download: fetch the files that are missing or differ from the published ones.
    """

    root: Path = Path("data")
    download: bool = False

    classes: ClassVar[int] = 10

    @abstractmethod
    def files(self) -> dict[str, str]:
        """The md5 of each file, by path below ``root``."""

    @abstractmethod
    def fetch(self) -> None:
        """Download the missing files; exceptions become the user's ``InputError``."""

    @abstractmethod
    def open(self, train: bool) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) uint8 and labels (N,) int64, from files that were checked."""

    @property
    def place(self) -> str:
        return f"{self.root}: {type(self).__name__}"

    def read(self) -> tuple[Split, Split, int]:
        if self.download:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                with exclusive(self.root / ".lock", str(self.root), wait=True):
                    self.fetch()
            except InputError:
                raise
            except Exception as error:  # torchvision raises what urllib, tarfile or gzip raise
                reason = " ".join(str(error).split())
                raise InputError(
                    f"{self.root}: {type(self).__name__} could not be downloaded ({reason}); "
                    "accepted: a network, or the files in torchvision's layout"
                ) from error
        for name, expected in self.files().items():
            _check_file(self.root / name, expected)
        return Split(*self.open(train=True)), Split(*self.open(train=False)), self.classes


def _check_file(path: Path, expected: str) -> None:
    try:
        found = md5_of(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; accepted: torchvision's layout, or --data.download true to fetch it"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); accepted: the published file") from error
    if found != expected:
        raise InputError(
            f"{path}: found md5 {found}; accepted: {expected} (the file is corrupt: remove it and fetch it again)"
        )


@dataclass(frozen=True)
class Cifar10(TorchvisionFiles):
    """CIFAR-10: 50 000 + 10 000 colour images of 32×32.

    The files are pickles, which torchvision opens after their md5 has been checked.
    """

    def _torchvision(self) -> Any:
        from torchvision.datasets import CIFAR10

        return CIFAR10

    def files(self) -> dict[str, str]:
        source = self._torchvision()
        names = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        return {f"{source.base_folder}/{name}": md5 for name, md5 in names}

    def fetch(self) -> None:
        self._torchvision()(str(self.root), download=True)

    def open(self, train: bool) -> tuple[Tensor, Tensor]:
        stored = self._torchvision()(str(self.root), train=train)
        return torch.as_tensor(stored.data).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(stored.targets).long()


@dataclass(frozen=True)
class Cifar100(Cifar10):
    """CIFAR-100: 50 000 + 10 000 colour images of 32×32, with the 100 fine labels. Pickles, as CIFAR-10's."""

    classes: ClassVar[int] = 100

    def _torchvision(self) -> Any:
        from torchvision.datasets import CIFAR100

        return CIFAR100


@dataclass(frozen=True)
class Svhn(TorchvisionFiles):
    """SVHN, cropped digits: 73 257 + 26 032 colour images of 32×32, without the ``extra`` images.

    The digit 0 has label 0 (the files say 10). Two MATLAB files, which scipy reads; nothing in them is executed.
    """

    def _published(self) -> dict[str, tuple[str, str, str]]:
        """``{split: (URL, name, md5)}``."""
        from torchvision.datasets import SVHN

        return {split: (url, name, md5) for split, (url, name, md5) in SVHN.split_list.items() if split != "extra"}

    def files(self) -> dict[str, str]:
        return {name: md5 for _, name, md5 in self._published().values()}

    def fetch(self) -> None:
        for url, name, md5 in self._published().values():
            fetch([url], self.root / name, md5)

    def open(self, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import SVHN

        stored = SVHN(str(self.root), split="train" if train else "test")
        return torch.as_tensor(stored.data).contiguous(), torch.as_tensor(stored.labels).long()
