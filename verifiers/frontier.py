"""What branch and bound has still to look at, as one row a subproblem."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frontier:
    """Open subproblems, P of them, of the images numbered ``image`` (P,) int64. Every field has P rows."""

    image: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: Tensor) -> Self:
        """Some of them: by numbers, or (P,) bool."""
        return type(self)(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def joined(self, other: Self) -> Self:
        return type(self)(**{f.name: torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)})
