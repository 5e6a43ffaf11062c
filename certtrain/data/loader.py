"""Batches of images from the device or a mapped file: keyed order, batched augmentation, no worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, check
from ..noise import Noise, key_of, permutation
from ..step import Augmentation, Batch, StateSpec
from .dataset import Split
from .resized_crop import draw, resize

PADDINGS = {
    "edge": ("replicate", None),
    "zero": ("constant", 0.0),
    "grey": ("constant", 0.5),
    "mirror": ("reflect", None),
}
"""torch's mode and value of each kind of padding."""


@dataclass(frozen=True)
class Augment:
    """Random crops and horizontal flips, drawn for each (seed, epoch, sample).

    The perturbation set is built around the augmented image.

    Args:
        pad: pixels added on each side before a crop of the image's size is drawn.
        flip: mirror half of the images left to right.
        padding: value of the added pixels: that of the nearest ``edge`` pixel; ``zero``, which is black, the value 0 of
            [0, 1] before the model normalises (recipes that pad after normalising fill with the mean colour);
            ``grey``, 0.5; or of the image's ``mirror``, without its outermost row.
        resized_crop: resize crops of 8 to 100 % of the stored image's area, 3/4 to 4/3 times as wide as high, to images
            of this side (as ``RandomResizedCrop``, antialiased); null for crops of the padded image.
    """

    pad: int = 0
    flip: bool = False
    padding: Literal["edge", "zero", "grey", "mirror"] = "edge"
    resized_crop: int | None = None

    def __post_init__(self) -> None:
        check(self.pad >= 0, "pad", self.pad, "a whole number >= 0")
        check(self.padding in PADDINGS, "padding", self.padding, ", ".join(PADDINGS))
        if self.resized_crop is not None:
            check(self.resized_crop >= 1, "resized_crop", self.resized_crop, "a whole number >= 1, or null")
            check(self.pad == 0, "pad", self.pad, "0 beside resized_crop")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse images (C, H, W) of another size than that of resized crops, or too small for their own mirror.

        Raises:
            InputError: the sizes differ; ``pad`` is not less than a side.
        """
        if self.padding == "mirror" and self.pad >= min(shape[-2:]):
            raise InputError(
                f"training.augment.pad: found {self.pad} for the mirror of images of {shape[-2]}×{shape[-1]}; "
                f"accepted: at most {min(shape[-2:]) - 1}"
            )
        if self.resized_crop is not None and tuple(shape[-2:]) != (self.resized_crop, self.resized_crop):
            raise InputError(
                f"training.augment.resized_crop: found {self.resized_crop} for images of {shape[-2]}×{shape[-1]}; "
                "accepted: their side, if they are square, or null"
            )

    def check_state(self, specs: Mapping[str, StateSpec]) -> None:
        """Refuse a state that stores perturbations in the frame of the padded image, where crops are resized.

        Raises:
            InputError: the loss or its attack declares such a state.
        """
        kept = [name for name, spec in specs.items() if spec.padded]
        if self.resized_crop is not None and kept:
            raise InputError(
                f"training.augment.resized_crop: found {self.resized_crop}, and a method that keeps a perturbation for "
                f"each sample ({kept[0]}); accepted: null, because pixels of a resized crop are not pixels of the image"
            )

    def __call__(self, images: Tensor, noise: Noise) -> tuple[Tensor, Augmentation | None]:
        """Augment images (B, C, H, W), or for resized crops stored images, and return what was drawn for each."""
        if self.resized_crop is not None:
            crop = draw(images.shape[2], images.shape[3], self.flip, noise)
            return resize(images, crop, self.resized_crop), crop
        if not self.pad and not self.flip:
            return images, None
        top, left = (noise.integers(2 * self.pad + 1, stream=side) for side in ("top", "left"))
        flip = noise.integers(2, stream="flip").bool() & self.flip
        height, width = images.shape[2:]
        mode, value = PADDINGS[self.padding]
        padded = F.pad(images, [self.pad] * 4, mode, value) if self.pad else images
        drawn = Augmentation(top, left, flip, self.pad)
        rows, columns = drawn.rows_and_columns(height, width)
        sample = torch.arange(len(images), device=images.device)[:, None, None]
        # (B, H, W, C): advanced indices around the channel dimension put it last
        cropped = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2).contiguous(), drawn


@dataclass(frozen=True)
class Loader:
    """Batches of the training split, epoch by epoch.

    Args:
        split: with its labels on the device.
        batch_size: images of a batch; the last one of an epoch may be smaller.
        augment: crops and flips of the images.
        seed: keys the order and the augmentation, together with the epoch.
    """

    split: Split
    batch_size: int
    augment: Augment
    seed: int

    def __post_init__(self) -> None:
        self.augment.check_shape(self.split.shape[1:])

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (0-based) from batch number ``start`` on; the same at every call."""
        order = permutation(len(self.split), self.seed, "order", epoch).to(self.split.labels.device)
        for number in range(start, len(self)):
            index = order[number * self.batch_size : (number + 1) * self.batch_size]
            cropped = self.augment.resized_crop is not None
            images = self.split.stored_pixels(index) if cropped else self.split.pixels(index)
            images, drawn = self.augment(images, Noise(key_of(self.seed, "augment", epoch), index))
            yield Batch(images, self.split.labels[index], index, drawn)


def in_order(split: Split, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Batches of the samples ``start`` to ``stop`` of a split, in order and without augmentation."""
    for first in range(start, len(split) if stop is None else stop, batch_size):
        last = min(first + batch_size, len(split) if stop is None else stop)
        index = torch.arange(first, last, device=split.labels.device)
        yield Batch(split.pixels(index), split.labels[index], index)
