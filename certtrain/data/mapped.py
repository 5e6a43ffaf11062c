"""Memory-mapped images: a batch is read when it is indexed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MappedImages:
    """Images of a memory-mapped file, in place of a split's image tensor.

    Args:
        array: (M, C, H, W) uint8, read-only; only indexed images are copied.
        sha256: checksum of the whole array, recorded when the file was made.
        rows: (N,) int64 on the CPU, the numbers of these images in the array; None for all.
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
        # numpy gathers, not torch: torch warns about read-only memory, and a writable private map larger than the
        # machine's memory may be refused
        return torch.from_numpy(self.array[self._of(index).numpy()])

    def subset(self, index: Tensor) -> MappedImages:
        """A view of some images; stores their numbers, not their pixels."""
        return MappedImages(self.array, self.sha256, self._of(index))

    def to(self, device: torch.device) -> Self:
        """Itself: images stay in the file, and a split moves each batch."""
        return self

    def _of(self, index: Tensor) -> Tensor:
        index = index.nonzero().flatten().cpu() if index.dtype == torch.bool else index.cpu()
        return index if self.rows is None else self.rows[index]
