"""Images that stay in their file: a batch is read when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MappedImages:
    """A memory-mapped file of images, or some of them; stands where a split's tensor of images stands.

    Args:
        array: (M, C, H, W) uint8, read-only; nothing of it is copied but what ``[…]`` asks for.
        sha256: of the whole array, as recorded when the file was made.
        rows: (N,) int64 on the CPU, which images of the array these are; None for all.
    """

    array: np.ndarray
    sha256: str
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.array) if self.rows is None else len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return len(self), *self.array.shape[1:]

    def __getitem__(self, index: Tensor) -> Tensor:
        """(B, C, H, W) uint8 on the CPU, a copy; ``index`` (B,) on any device."""
        # numpy gathers, not torch: a tensor of read-only memory cannot be had without a warning, and a writable
        # private map of more bytes than the machine's memory may be refused
        return torch.from_numpy(self.array[self._of(index).numpy()])

    def subset(self, index: Tensor) -> MappedImages:
        """Those images; their numbers are kept, not their pixels."""
        return MappedImages(self.array, self.sha256, self._of(index))

    def to(self, device: torch.device) -> Self:
        """They stay where they are: a split moves each batch."""
        return self

    def _of(self, index: Tensor) -> Tensor:
        index = index.nonzero().flatten().cpu() if index.dtype == torch.bool else index.cpu()
        return index if self.rows is None else self.rows[index]
