"""MNIST and FashionMNIST, in files of the idx format, each checked against its published md5 before use."""

from __future__ import annotations

import gzip
import struct
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..run_folder import write_atomically
from .download import fetch, md5_of
from .torchvision_files import TorchvisionFiles

NAMES = {True: "train-{}-idx{}-ubyte", False: "t10k-{}-idx{}-ubyte"}


@dataclass(frozen=True)
class IdxFiles(TorchvisionFiles):
    """Grey images in four idx files below ``root/NAME/raw``, torchvision's layout."""

    @abstractmethod
    def _torchvision(self) -> Any:
        """torchvision's class, which knows the mirrors and the md5 of each ``.gz``."""

    @abstractmethod
    def _content(self, path: Path) -> bytes:
        """The content of the idx file of that name, unpacked."""

    @property
    def folder(self) -> Path:
        return self.root / self._torchvision().__name__ / "raw"

    def fetch(self) -> None:
        source = self._torchvision()
        for name, md5 in source.resources:
            fetch([mirror + name for mirror in source.mirrors], self.folder / name, md5)

    def open(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = (
            read_idx(self._content(self.folder / NAMES[train].format(kind, rank)))
            for kind, rank in (("images", 3), ("labels", 1))
        )
        return images.unsqueeze(1), labels.long()


def read_idx(content: bytes) -> Tensor:
    """The uint8 tensor in an idx file: zeros, 8, the rank; big-endian 32-bit sizes; the values.

    Raises:
        ValueError: this is no idx file of bytes.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("not an idx file of bytes")
    start = 4 + 4 * content[3]
    sizes = struct.unpack(f">{content[3]}I", content[4:start])
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())


@dataclass(frozen=True)
class Mnist(IdxFiles):
    """MNIST: 60 000 + 10 000 grey images of 28×28."""

    def _torchvision(self) -> Any:
        from torchvision.datasets import MNIST

        return MNIST

    def files(self) -> dict[str, str]:
        raw = {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        }
        return {f"MNIST/raw/{name}": md5 for name, md5 in raw.items()}

    def fetch(self) -> None:
        lacking = [
            n for n, md5 in self.files().items() if not (self.root / n).is_file() or md5_of(self.root / n) != md5
        ]
        if lacking:
            super().fetch()
        for path in (self.root / name for name in lacking):
            content = gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
            write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))

    def _content(self, path: Path) -> bytes:
        return path.read_bytes()


@dataclass(frozen=True)
class FashionMnist(IdxFiles):
    """FashionMNIST: 60 000 + 10 000 grey images of 28×28 (arXiv 1708.07747).

    Read from the ``.gz`` files, because the publisher lists md5s of these only; unpacked files beside them, which
    torchvision makes, are ignored.
    """

    def _torchvision(self) -> Any:
        from torchvision.datasets import FashionMNIST

        return FashionMNIST

    def files(self) -> dict[str, str]:
        return {f"FashionMNIST/raw/{name}": md5 for name, md5 in self._torchvision().resources}

    def _content(self, path: Path) -> bytes:
        return gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
