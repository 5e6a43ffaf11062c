"""Large data sets, converted once into a memory-mapped file beside their folder."""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..locking import exclusive, lock_of
from ..progress import Progress
from ..run_folder import clear_leftovers, write_atomically
from .dataset import Source, Split
from .mapped import MappedImages

FORMAT = "1"
HEADER = 4096
"""Bytes before the images: safetensors' length and JSON, padded with blanks; written last, with the checksums."""

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Contents:
    """The content of a split that is to be written into the prepared file.

    Args:
        labels: (N,) int64.
        images: blocks (B, C, H, W) of uint8, N images in all; read lazily.
    """

    labels: Tensor
    images: Iterable[np.ndarray]


@dataclass(frozen=True)
class PreparedSource(Source):
    """A folder of images that is converted into one memory-mapped ``.safetensors`` file beside it.

    The file is made again when ``state_of_folder`` has changed. It appears whole or not at all; of several processes
    that start at once, one prepares it and the others wait.

    Args:
        root: the folder of images.
    """

    root: Path = Path("data")

    @property
    def place(self) -> str:
        return str(self.root)

    @property
    def prepared(self) -> Path:
        """The path of the prepared file: the folder's name and ``.safetensors``."""
        return Path(f"{os.path.abspath(self.root)}.safetensors")

    @abstractmethod
    def state_of_folder(self) -> str:
        """A text that is cheap to compute and changes when the content of the folder does.

        Raises:
            InputError: names a file or folder that is missing.
        """

    @abstractmethod
    def contents(self) -> tuple[dict[str, Contents], int]:
        """The splits ``train`` and ``test`` to prepare, and the number of classes.

        Raises:
            InputError: names a file that cannot be used; also raised while the images are read.
        """

    def read(self) -> tuple[Split, Split, int]:
        state = hashlib.sha256(f"{type(self).__name__} {self.state_of_folder()}".encode()).hexdigest()
        found = open_prepared(self.prepared, state)
        if found is None:
            with exclusive(lock_of(self.prepared), str(self.prepared), wait=True) as locked:
                found = open_prepared(self.prepared, state)
                if found is None:
                    self._prepare(state, locked)
                    found = open_prepared(self.prepared, state)
        if found is None:
            raise InputError(f"{self.prepared}: found another file; accepted: the one that was just prepared")
        return found

    def _prepare(self, state: str, locked: bool) -> None:
        try:
            if locked:
                clear_leftovers(self.prepared)
            contents, classes = self.contents()
            count = sum(len(contents[name].labels) for name in SPLITS)
            with Progress(f"preparing {self.prepared.name}", count) as progress:
                progress.line(f"preparing {self.prepared} from {count} images, once")
                write_atomically(self.prepared, lambda temporary: _write(temporary, contents, classes, state, progress))
        except OSError as error:
            raise InputError(
                f"{self.prepared}: cannot be written ({error.strerror or error}); accepted: a folder with room for the "
                f"images (data.root may be a symbolic link in such a one)"
            ) from error


def _write(path: Path, contents: dict[str, Contents], classes: int, state: str, progress: Progress) -> None:
    metadata = {"format": FORMAT, "state": state, "classes": str(classes)}
    header: dict[str, Any] = {"__metadata__": metadata}
    with path.open("wb") as file:
        file.seek(HEADER)

        def describe(name: str, dtype: str, shape: tuple[int, ...], start: int) -> None:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start - HEADER, file.tell() - HEADER)}

        for name in SPLITS:
            digest, start, count, shape = hashlib.sha256(), file.tell(), 0, ()
            for block in contents[name].images:
                content = np.ascontiguousarray(block).data
                file.write(content)
                digest.update(content)
                count, shape = count + len(block), block.shape[1:]
                progress.advance(len(block))
            if count != len(contents[name].labels):
                raise InputError(
                    f"{path}: found {count} images; accepted: one for each label, files that stay as they are"
                )
            metadata[f"{name}_images_sha256"] = digest.hexdigest()
            describe(f"{name}_images", "U8", (count, *shape), start)
        for name in SPLITS:
            start, labels = file.tell(), contents[name].labels.numpy()
            file.write(labels.astype("<i8").data)
            describe(f"{name}_labels", "I64", labels.shape, start)
        text = json.dumps(header).encode()
        file.seek(0)
        file.write((HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8))


def open_prepared(path: Path, state: str) -> tuple[Split, Split, int] | None:
    """(training split, test split, number of classes), or None without a complete file prepared from that state."""
    try:
        with path.open("rb") as file:
            return _open(file, state)
    except (OSError, ValueError, KeyError, TypeError):  # truncated, or another file: it is prepared again
        return None


def _open(file: IO[bytes], state: str) -> tuple[Split, Split, int] | None:
    if int.from_bytes(file.read(8), "little") != HEADER - 8:
        return None
    header = json.loads(file.read(HEADER - 8))
    metadata = header["__metadata__"]
    size = HEADER + header["test_labels"]["data_offsets"][1]
    if metadata["format"] != FORMAT or metadata["state"] != state or os.fstat(file.fileno()).st_size != size:
        return None
    splits = []
    for name in SPLITS:
        images, labels = header[f"{name}_images"], header[f"{name}_labels"]
        start = HEADER + images["data_offsets"][0]
        array = np.memmap(file, np.uint8, "r", offset=start, shape=tuple(images["shape"]))
        file.seek(HEADER + labels["data_offsets"][0])
        stored = np.frombuffer(file.read(8 * labels["shape"][0]), "<i8").astype(np.int64)
        mapped = MappedImages(np.asarray(array), metadata[f"{name}_images_sha256"])
        splits.append(Split(mapped, torch.from_numpy(stored)))
    return splits[0], splits[1], int(metadata["classes"])
