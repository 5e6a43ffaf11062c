from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, check
from .dataset import Split
from .image_files import NAME, decoded, files_in, folders_in, lines_of, missing
from .prepared import Contents, PreparedSource

CLASSES = 100
LAYOUT = "ImageNet's folders for each class, train/WNID/*.JPEG and val/WNID/*.JPEG"
ENDINGS = (".jpeg", ".jpg")
FORMATS = ("JPEG", "PNG")
"""PNG, because one of ImageNet's .JPEG files, n02105855_2933, is one."""


@dataclass(frozen=True)
class ImageNet100(PreparedSource):
    """A hundred of ImageNet's classes, in colour, 224×224: about 127 000 training images, and 5000 to test on.

    Each image's shorter side is resized to ``stored`` (bilinear, antialiased, by Pillow, as torchvision does), and the
    centre square is kept. The image is the centre square of side ``shown`` of that, the usual test protocol.
    ``training.augment.resized_crop`` draws its crops from the stored square, not from the file.

    The published validation split is the test split, as everywhere in the field. Classes are numbered in the order of
    their sorted WordNet ids, as by torchvision's ``ImageFolder``. Test images are numbered in turns, the first of each
    class, the second of each, …, so that the first 500 are five of every class; training images by class.

    Args:
        root: the folder with ``train`` and ``val``, which you bring: see docs/data.md.
        class_list: a text file with the WordNet id of one class a line; null takes the folders of ``train``, which must
            be 100.
        stored, shown: sides in pixels.
    """

    root: Path = Path("data/imagenet100")
    class_list: Path | None = None
    stored: int = 256
    shown: int = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.shown >= 1, "shown", self.shown, "a whole number >= 1")
        fits = self.stored >= self.shown and (self.stored - self.shown) % 2 == 0  # else half a pixel off centre
        check(fits, "stored", self.stored, f"shown, {self.shown}, or an even number more")

    @property
    def prepared(self) -> Path:
        return super().prepared.with_suffix(f".{self.stored}.safetensors")

    def read(self) -> tuple[Split, Split, int]:
        train, test, classes = super().read()
        return replace(train, shown=self.shown), replace(test, shown=self.shown), classes

    def state_of_folder(self) -> str:
        """The classes, and the times of their folders, which change when an image is added, removed or renamed. An
        image that is overwritten in place is not noticed."""
        classes = self._classes()
        folders = [self.root / split / name for split in ("train", "val") for name in classes]
        try:
            return " ".join([str(self.stored), *classes, *(f"{os.stat(folder).st_mtime_ns}" for folder in folders)])
        except OSError as error:
            raise missing(error, LAYOUT) from error

    def contents(self) -> tuple[dict[str, Contents], int]:
        classes = self._classes()
        train = [(path, label) for label, name in enumerate(classes) for path in self._images("train", name)]
        turns = [
            (turn, label, path)
            for label, name in enumerate(classes)
            for turn, path in enumerate(self._images("val", name))
        ]
        test = [(path, label) for _, label, path in sorted(turns)]
        splits = {
            name: Contents(
                torch.tensor([label for _, label in images]),
                decoded([path for path, _ in images], FORMATS, self._square),
            )
            for name, images in (("train", train), ("test", test))
        }
        return splits, len(classes)

    def _images(self, split: str, name: str) -> list[Path]:
        folder = self.root / split / name
        return [folder / file for file in files_in(folder, ENDINGS, LAYOUT)]

    def _classes(self) -> list[str]:
        """The WordNet ids of the classes, sorted."""
        if self.class_list is None:
            names = folders_in(self.root / "train", LAYOUT)
            if len(names) != CLASSES:
                raise InputError(
                    f"{self.root / 'train'}: found {len(names)} classes; accepted: {CLASSES}, or a list of those to "
                    "take (--data.class_list FILE)"
                )
            return names
        names = [line.strip() for line in lines_of(self.class_list, "one WordNet id a line")]
        for number, name in enumerate(names, start=1):
            if not NAME.fullmatch(name) or name in names[: number - 1]:
                raise InputError(
                    f"{self.class_list}, line {number}: found {name!r}; accepted: a WordNet id, each one once"
                )
        if not names:
            raise InputError(f"{self.class_list}: found no classes; accepted: one WordNet id a line")
        return sorted(names)

    def _square(self, image: Any) -> Any:
        """Resize the shorter side of a Pillow image, and crop the centre square."""
        from PIL import Image

        width, height = image.size
        shorter = min(width, height)
        width, height = (self.stored * side // shorter for side in (width, height))  # rounded down, as torchvision
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (round((side - self.stored) / 2) for side in (width, height))
        return resized.crop((left, top, left + self.stored, top + self.stored))
