from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..locking import exclusive, lock_of
from ..run_folder import clear_leftovers
from .dataset import Split
from .download import fetch, unpack
from .prepared import Contents, PreparedSource

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
FOLDER = "tiny-imagenet-200"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
"""The md5 of that zip (248 100 043 bytes). The publisher lists none; many public loaders record this one."""

SIZE = 64
BLOCK = 256
LAYOUT = (
    "the published layout (wnids.txt, train/WNID/images, val/images, val/val_annotations.txt), "
    "or --data.download true with a root that is not there yet"
)
NAME = re.compile(r"\w[\w.-]*")  # the name of a class or a file, never a path


@dataclass(frozen=True)
class TinyImageNet(PreparedSource):
    """TinyImageNet: 200 classes of 500 training images, and 10 000 images to test on, in colour, 64×64.

    The published validation split is the test split, as everywhere in the field: the published test images have no
    labels. Classes are numbered in the order of their sorted WordNet ids, as by torchvision's ``ImageFolder``; test
    images are numbered in the order of ``val_annotations.txt`` (``ImageFolder`` sorts them by class, so that its first
    1000 are 20 classes). Grey JPEGs become grey RGB.

    Args:
        root: the folder ``tiny-imagenet-200`` of the published zip.
        download: fetch the zip and unpack it as ``root``, unless ``root`` exists.
    """

    root: Path = Path("data/tiny-imagenet-200")
    download: bool = False

    def read(self) -> tuple[Split, Split, int]:
        if self.download and not self.root.exists():
            self._fetch()
        return super().read()

    def state_of_folder(self) -> str:
        """Sizes and times of the two lists, and times of the image folders, which change when an image is added,
        removed or renamed. An image that is overwritten in place is not noticed."""
        lists = [self.root / "wnids.txt", self.root / "val" / "val_annotations.txt"]
        folders = [self._images(wnid) for wnid in self._wnids()] + [self.root / "val" / "images"]
        try:
            facts = [f"{status.st_size} {status.st_mtime_ns}" for status in map(os.stat, lists)]
            return " ".join([*facts, *(f"{os.stat(folder).st_mtime_ns}" for folder in folders)])
        except OSError as error:
            raise _missing(error) from error

    def contents(self) -> tuple[dict[str, Contents], int]:
        wnids = self._wnids()
        train = [(path, label) for label, wnid in enumerate(wnids) for path in self._of_class(wnid)]
        test = self._annotated({wnid: label for label, wnid in enumerate(wnids)})
        splits = {
            name: Contents(torch.tensor([label for _, label in images]), _decoded([path for path, _ in images]))
            for name, images in (("train", train), ("test", test))
        }
        return splits, len(wnids)

    def _fetch(self) -> None:
        root = Path(os.path.abspath(self.root))
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{root.parent}: cannot be made ({error.strerror}); accepted: a folder") from error
        with exclusive(lock_of(root), str(root), wait=True) as locked:
            if not root.exists():
                if locked:
                    clear_leftovers(root)
                archive = root.parent / f"{FOLDER}.zip"
                fetch([URL], archive, MD5)
                unpack(archive, FOLDER, root)

    def _images(self, wnid: str) -> Path:
        return self.root / "train" / wnid / "images"

    def _wnids(self) -> list[str]:
        """The classes, sorted."""
        path = self.root / "wnids.txt"
        wnids = [line.strip() for line in _lines(path)]
        for number, wnid in enumerate(wnids, start=1):
            if not NAME.fullmatch(wnid) or wnid in wnids[: number - 1]:
                raise InputError(f"{path}, line {number}: found {wnid!r}; accepted: a WordNet id, each one once")
        if not wnids:
            raise InputError(f"{path}: found no classes; accepted: {LAYOUT}")
        return sorted(wnids)

    def _of_class(self, wnid: str) -> list[Path]:
        """The training images of a class, sorted; complete if the class has its list of boxes, which names all
        images."""
        folder = self._images(wnid)
        names = _names(folder)
        boxes = folder.with_name(f"{wnid}_boxes.txt")
        listed = {line.split("\t")[0] for line in _lines(boxes)} if boxes.exists() else set(names[:1])
        if not names:
            raise InputError(f"{folder}: found no images; accepted: {LAYOUT}")
        if lacking := sorted(listed - set(names)):
            raise InputError(
                f"{folder / lacking[0]}: no such file; accepted: the {len(listed)} images that {boxes.name} lists"
            )
        return [folder / name for name in names]

    def _annotated(self, labels: dict[str, int]) -> list[tuple[Path, int]]:
        path, folder = self.root / "val" / "val_annotations.txt", self.root / "val" / "images"
        there, images = set(_names(folder)), {}
        for number, line in enumerate(_lines(path), start=1):
            name, wnid, *_ = [*line.split("\t"), ""]
            wnid = wnid.strip()
            if wnid not in labels:
                raise InputError(f"{path}, line {number}: found {wnid!r}; accepted: a WordNet id of wnids.txt")
            if name not in there or name in images:
                raise InputError(f"{path}, line {number}: found {name!r}; accepted: a file in {folder}, each one once")
            images[name] = labels[wnid]
        if set(images) != there or not images:
            extra = min(there - set(images), default="no images")
            raise InputError(f"{folder}: found {extra}; accepted: the images that {path.name} lists")
        return [(folder / name, label) for name, label in images.items()]


def _missing(error: OSError) -> InputError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return InputError(f"{error.filename}: {reason}; accepted: {LAYOUT}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise _missing(error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error}); accepted: {LAYOUT}") from error


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.upper().endswith((".JPEG", ".JPG")))
    except OSError as error:
        raise _missing(error) from error


def _decoded(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    for first in range(0, len(paths), BLOCK):
        yield np.stack([_decode(path) for path in paths[first : first + BLOCK]])


def _decode(path: Path) -> np.ndarray:
    """Decode one image: (3, 64, 64) uint8."""
    from PIL import Image

    try:
        with Image.open(path, formats=["JPEG"]) as image:
            size = image.size  # before a pixel is decoded
            pixels = np.asarray(image.convert("RGB")) if size == (SIZE, SIZE) else None
    except Exception as error:  # Pillow raises OSError, SyntaxError, DecompressionBombError, …
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({reason}); accepted: a JPEG of {SIZE}×{SIZE} pixels") from error
    if pixels is None:
        raise InputError(f"{path}: found {size[0]}×{size[1]} pixels; accepted: {SIZE}×{SIZE}")
    return pixels.transpose(2, 0, 1)
