"""Data sources and the data sets that they load: explicit splits of checked images and labels."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config import Component
from ..errors import InputError, check
from ..labels import as_labels, check_labels
from ..noise import permutation
from .mapped import MappedImages


@dataclass(frozen=True)
class Split:
    """Images as stored, and labels.

    Args:
        images: (N, C, H, W) uint8 in 0..full_scale, or float32 in [0, 1]; on the labels' device, or a memory-mapped
            file, which stays where it is.
        labels: (N,) int64; other whole numbers are converted.
        full_scale: the stored value that means 1.0 (255; 16 for scikit-learn's digits; 1 for floats).
        shown: side of the centre square that is the image, where more is stored for crops in training; None where the
            stored image is the image.
    """

    images: Tensor | MappedImages
    labels: Tensor
    full_scale: int = 255
    shown: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", as_labels(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W) of all images as ``pixels`` returns them."""
        shape = tuple(self.images.shape)
        return shape if self.shown is None else (*shape[:2], self.shown, self.shown)

    def pixels(self, index: Tensor) -> Tensor:
        """(B, C, H, W) float32 in [0, 1], on the labels' device."""
        stored = self.images[index]
        if self.shown is not None:
            top, left = ((side - self.shown) // 2 for side in stored.shape[2:])
            stored = stored[:, :, top : top + self.shown, left : left + self.shown]
        return self._scaled(stored)

    def stored_pixels(self, index: Tensor) -> Tensor:
        """``pixels`` without the crop to the centre square: everything that is stored."""
        return self._scaled(self.images[index])

    def _scaled(self, stored: Tensor) -> Tensor:
        return stored.to(self.labels.device).float() / self.full_scale

    def to(self, device: torch.device) -> Split:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, index: Tensor) -> Split:
        images = self.images.subset(index) if isinstance(self.images, MappedImages) else self.images[index]
        return replace(self, images=images, labels=self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Three splits. Selection and tuning may use ``validation``, never ``test``.

    Args:
        classes: K; labels lie in 0..K-1.
        checksum: sha256 over all images and labels as stored; a memory-mapped file's images count with the sha256
            that was recorded when it was made.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    checksum: str

    def to(self, device: torch.device) -> Dataset:
        train, validation, test = (split.to(device) for split in (self.train, self.validation, self.test))
        return Dataset(train, validation, test, self.classes, self.checksum)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return self.train.shape[1:]


@dataclass(frozen=True)
class Source(Component):
    """A place that images are read from. Concrete sources are one file each.

    Args:
        validation: share of the training images that is held out for selection, drawn class by class with a
            fixed key; 0 trains on all (as the published recipes do) and leaves the split empty.
    """

    validation: float = 0.0

    def __post_init__(self) -> None:
        check(0 <= self.validation < 1, "validation", self.validation, "a share in [0, 1)")

    @property
    def place(self) -> str:
        """The file, folder or name to show in messages."""
        return type(self).__name__

    @abstractmethod
    def read(self) -> tuple[Split, Split, int]:
        """(training split, test split, number of classes) as stored.

        Raises:
            InputError: names a file that is missing or corrupt.
        """

    def load(self) -> Dataset:
        """Read, check and split.

        Raises:
            InputError: as ``read``; labels or pixels out of range, NaN, shapes that do not fit.
        """
        train, test, classes = self.read()
        for name, split in (("train", train), ("test", test)):
            _check(split, classes, f"{self.place} {name}")
        if classes < 2:  # one class has no margins: everything would be verified
            raise InputError(f"{self.place}: found {classes} class; accepted: two or more, labels from 0 on")
        if train.shape[1:] != test.shape[1:]:
            raise InputError(
                f"{self.place}: found test images of shape {test.shape[1:]}; "
                f"accepted: that of the training images, {train.shape[1:]}"
            )
        kept, held_out = split_by_class(train.labels, self.validation)
        check(len(kept), "data.validation", self.validation, "a share that leaves images to train on")
        return Dataset(train.subset(kept), train.subset(held_out), test, classes, _checksum(train, test))


def split_by_class(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(kept, held out): sorted sample numbers; ``round(share · n)`` of each class are held out, by a fixed key."""
    held_out = []
    classes, counts = labels.unique(return_counts=True)
    by_class = labels.argsort(stable=True).split(counts.tolist())  # one pass over 1.3 million labels
    for label, members in zip(classes.tolist(), by_class):
        order = permutation(len(members), "split", label)
        held_out.append(members[order[: round(share * len(members))]])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for members in held_out:
        chosen[members] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _check(split: Split, classes: int, where: str) -> None:
    images, labels = split.images, split.labels
    if len(images.shape) != 4 or len(images) != len(labels) or 0 in images.shape:
        raise InputError(
            f"{where}: found images of shape {tuple(images.shape)} and {len(labels)} labels; "
            "accepted: (N, C, H, W) and N labels, none of them 0"
        )
    check_labels(labels, classes, where)
    if isinstance(images, MappedImages):  # bytes with full scale 255: none can be out of range
        return
    if images.is_floating_point():
        bad = images.isnan().flatten(1).any(1).nonzero().flatten()
        if len(bad):
            raise InputError(f"{where}: found a NaN pixel in image {int(bad[0])}; accepted: pixels in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > split.full_scale:
        raise InputError(f"{where}: found pixels from {low:g} to {high:g}; accepted: 0 to {split.full_scale}")


def _checksum(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        if split.shown is not None:
            digest.update(f"shown {split.shown}".encode())
        for part in (split.images, split.labels):
            if isinstance(part, MappedImages):
                digest.update(part.sha256.encode())
            else:
                digest.update(np.ascontiguousarray(part.numpy()).data)
    return digest.hexdigest()
