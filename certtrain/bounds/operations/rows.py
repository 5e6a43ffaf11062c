"""Values as rows, over which softmax and normalisations run, and linear enclosures of functions of whole rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..interval import Bounds, Interval
from ..relaxation import InputLines, Relaxation
from .base import UnsupportedOperation


class Rows(ABC):
    """How values (B, *shape) fall into rows (B, …, K) of numbers."""

    @abstractmethod
    def split(self, x: Tensor) -> Tensor:
        """The rows of ``x``."""

    @abstractmethod
    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Values (N, *shape) from rows (N, …, K)."""

    def bounds(self, x: Bounds | Interval) -> Bounds:
        """The rows of both ends."""
        return Bounds(self.split(x.lower), self.split(x.upper))

    def interval(self, rows: Interval, shape: torch.Size) -> Interval:
        """The interval of values from that of their rows."""
        return Interval(self.join(rows.center, shape), self.join(rows.radius, shape))

    def split_forms(self, forms: Tensor) -> Tensor:
        """The rows (B, R, …, K) of forms or lines (B, R, *shape)."""
        rows = self.split(forms.flatten(0, 1))
        return rows.reshape(*forms.shape[:2], *rows.shape[1:])

    def join_forms(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Forms or lines (B, R, *shape) from their rows."""
        joined = self.join(rows.flatten(0, 1), shape)
        return joined.reshape(*rows.shape[:2], *joined.shape[1:])


@dataclass(frozen=True)
class Along(Rows):
    """Rows along one dimension, as torch numbers it.

    Args:
        place: for errors.
    """

    dim: int
    place: str

    def _dim(self, rank: int) -> int:
        dim = self.dim + rank if self.dim < 0 else self.dim
        if not 1 <= dim < rank:
            raise UnsupportedOperation(
                f"{self.place}: found dim={self.dim} of {rank} dimensions; accepted: one behind the batch"
            )
        return dim

    def split(self, x: Tensor) -> Tensor:
        return x.movedim(self._dim(x.ndim), -1)

    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.movedim(-1, self._dim(rows.ndim))


@dataclass(frozen=True)
class LastOnes(Rows):
    """Rows of the entries of the last ``count`` dimensions."""

    count: int

    def split(self, x: Tensor) -> Tensor:
        return x.flatten(-self.count) if self.count > 1 else x

    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.reshape(rows.shape[0], *shape) if self.count > 1 else rows


@dataclass(frozen=True)
class Groups(Rows):
    """Rows of ``count`` groups of channels, which are dimension 1; 0 for a row for each channel.

    Args:
        places: number of dimensions behind the channels; None for any.
        place: for errors.
    """

    count: int
    places: int | None
    place: str

    def split(self, x: Tensor) -> Tensor:
        if self.places is not None and x.ndim != 2 + self.places:
            raise UnsupportedOperation(
                f"{self.place}: found {x.ndim} dimensions; accepted: {2 + self.places}, the batch and channels in front"
            )
        count = self.count or x.shape[1]
        return x.reshape(x.shape[0], count, x.shape[1:].numel() // count)

    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return rows.reshape(rows.shape[0], *shape)


@dataclass(frozen=True)
class RowLines(Relaxation):
    """Each entry of a row between two linear functions of the whole row.

    Args:
        lower, upper: (B, …, K, K): slopes of output i in input j.
        below, above: (B, …, K), constants.
        rows: how values fall into rows.
    """

    lower: Tensor
    upper: Tensor
    below: Tensor
    above: Tensor
    rows: Rows

    def map(self, function: Callable[[Tensor], Tensor]) -> RowLines:
        slopes = function(self.lower), function(self.upper)
        return RowLines(*slopes, function(self.below), function(self.above), self.rows)

    def backward(self, forms: Tensor, constants: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        split = self.rows.split_forms(forms)
        positive, negative = split.clamp(min=0), split.clamp(max=0)
        through = _times(positive, self.lower) + _times(negative, self.upper)
        constant = positive * self.below.unsqueeze(1) + negative * self.above.unsqueeze(1)
        return (self.rows.join_forms(through, forms.shape[2:]),), constants + constant.flatten(2).sum(-1)

    def forward(self, *inputs: InputLines) -> InputLines:
        (x,) = inputs
        low, high = self.rows.split_forms(x.lower), self.rows.split_forms(x.upper)
        lower = _times(low, self.lower.clamp(min=0).mT) + _times(high, self.lower.clamp(max=0).mT)
        upper = _times(high, self.upper.clamp(min=0).mT) + _times(low, self.upper.clamp(max=0).mT)
        lower[:, -1] += self.below
        upper[:, -1] += self.above
        shape = x.lower.shape[2:]
        return InputLines(self.rows.join_forms(lower, shape), self.rows.join_forms(upper, shape))


def _times(forms: Tensor, matrices: Tensor) -> Tensor:
    """Rows (B, R, …, K) times matrices (B, …, K, K), as one product of matrices for each row."""
    return (forms.movedim(1, -2) @ matrices).movedim(-2, 1)
