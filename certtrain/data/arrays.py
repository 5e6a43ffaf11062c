from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..labels import as_labels
from .dataset import Source, Split

KEYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Arrays(Source):
    """Your own images, from one ``.npz`` file of plain arrays (pickled objects are refused).

    ``train_images`` and ``test_images`` (N, C, H, W) as uint8, or as floats in [0, 1]; ``train_labels`` and
    ``test_labels`` (N,) or (N, 1) whole numbers from 0. The number of classes is the largest training label plus one.

    Args:
        path: the ``.npz`` file.
    """

    path: Path = Path("data/arrays.npz")

    @property
    def place(self) -> str:
        return str(self.path)

    def read(self) -> tuple[Split, Split, int]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in KEYS}
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: no such file; accepted: an .npz with {', '.join(KEYS)}") from error
        except Exception as error:  # numpy raises KeyError, ValueError, BadZipFile, EOFError, …
            reason = str(error).partition(". ")[0]  # the rest of numpy's message advises to unpickle the file
            raise InputError(
                f"{self.path}: cannot be read ({reason}); accepted: an .npz with {', '.join(KEYS)}"
            ) from error
        splits = [self._split(arrays, name) for name in ("train", "test")]
        return splits[0], splits[1], int(splits[0].labels.max()) + 1 if len(splits[0]) else 0

    def _split(self, arrays: dict[str, np.ndarray], name: str) -> Split:
        images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise InputError(f"{self.path} {name}_images: found {images.dtype}; accepted: uint8, or floats in [0, 1]")
        column = labels.ndim == 2 and labels.shape[1] == 1
        numbers = as_labels(labels[:, 0] if column else labels, where=f"{self.path} {name}_labels")
        whole = images.dtype == np.uint8
        stored = torch.from_numpy(images if whole else images.astype(np.float32))
        return Split(stored, numbers, 255 if whole else 1)
