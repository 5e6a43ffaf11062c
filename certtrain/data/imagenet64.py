from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .prepared import Contents, PreparedSource

TRAIN = tuple(f"train_data_batch_{number}.npz" for number in range(1, 11))
TEST = ("val_data.npz",)
CLASSES = 1000
SHAPE = (3, 64, 64)
COLUMNS = math.prod(SHAPE)
BLOCK = 4096  # images: 50 MB
LAYOUT = "the published 64×64 npz files, train_data_batch_1.npz to train_data_batch_10.npz and val_data.npz"


@dataclass(frozen=True)
class ImageNet64(PreparedSource):
    """ImageNet downsampled to 64×64: 1 281 167 training images of 1000 classes, and 50 000 to test on.

    Chrabaszcz, Loshchilov and Hutter (arXiv 1707.08819). The published validation split is the test split, as
    everywhere in the field. Labels are the published ones (1 to 1000) less 1, images in the files' order.

    Args:
        root: the folder of the eleven ``.npz`` files; they are behind a registration, see docs/data.md.
    """

    root: Path = Path("data/imagenet64")

    def state_of_folder(self) -> str:
        """Sizes and times of the eleven files."""
        try:
            status = [os.stat(self.root / name) for name in TRAIN + TEST]
        except OSError as error:
            raise InputError(f"{error.filename}: no such file; accepted: {LAYOUT}, see docs/data.md") from error
        return " ".join(f"{one.st_size} {one.st_mtime_ns}" for one in status)

    def contents(self) -> tuple[dict[str, Contents], int]:
        return {"train": self._split(TRAIN), "test": self._split(TEST)}, CLASSES

    def _split(self, names: Sequence[str]) -> Contents:
        """Read all labels and shapes now, the images on demand."""
        paths = [self.root / name for name in names]
        return Contents(torch.cat([_labels(path) for path in paths]), (block for p in paths for block in _images(p)))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[np.ndarray, IO[bytes], int]]:
    """Open a batch file: its labels, the stream of its pixels, and the number of images; nothing is unpickled."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile) or file.zip is None:
            raise ValueError("not an .npz")
        with file, file.zip.open("data.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read_header(stream)
            _check_shape(path, shape, dtype, fortran)
            yield file["labels"], stream, shape[0]
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise KeyError, ValueError, BadZipFile, EOFError, …
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: cannot be read ({reason}); accepted: an .npz with data (N, {COLUMNS}) and labels (N,)"
        ) from error


def _check_shape(path: Path, shape: tuple[int, ...], dtype: np.dtype, fortran: bool) -> None:
    if len(shape) != 2 or shape[1] != COLUMNS:
        side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
        guess = f", images of {side}×{side}" if side and 3 * side**2 == shape[1] else ""
        raise InputError(f"{path}: found data of shape {shape}{guess}; accepted: (N, {COLUMNS}), images of 64×64")
    if dtype != np.uint8 or fortran or not shape[0]:
        order = "Fortran" if fortran else "C"
        raise InputError(
            f"{path}: found {shape[0]} images as {dtype} in {order} order; accepted: 1 or more as uint8 in C order"
        )


def _labels(path: Path) -> Tensor:
    """Labels (N,) int64 in 0..999."""
    with _opened(path) as (labels, _, count):
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise InputError(
                f"{path}: found labels of shape {labels.shape} as {labels.dtype}; accepted: ({count},) integers"
            )
        wrong = np.flatnonzero((labels < 1) | (labels > CLASSES))
        if len(wrong):
            raise InputError(f"{path}: found label {labels[wrong[0]]} at image {wrong[0]}; accepted: 1 to {CLASSES}")
        return torch.from_numpy(labels.astype(np.int64) - 1)


def _images(path: Path) -> Iterator[np.ndarray]:
    """Images in blocks (B, 3, 64, 64) of uint8; the zip's CRC-32 is checked on the way."""
    with _opened(path) as (_, stream, count):
        for first in range(0, count, BLOCK):
            rows = min(BLOCK, count - first)
            content = stream.read(rows * COLUMNS)
            if len(content) != rows * COLUMNS:
                raise ValueError(f"ends after {first * COLUMNS + len(content)} of {count * COLUMNS} pixels")
            yield np.frombuffer(content, np.uint8).reshape(rows, *SHAPE)
        if stream.read(1):
            raise ValueError(f"more than {count * COLUMNS} pixels")
