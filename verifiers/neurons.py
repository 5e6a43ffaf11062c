"""The inputs of a network's non-linear operations as one row, and chosen ones of them in columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import Bounds
from ..bounds.network import Network


@dataclass(frozen=True)
class Neurons:
    """The inputs of all non-linear operations as one flat row of N entries for each image.

    Args:
        places: positions of the operations in the network; shapes: shapes of their inputs, several as one flat one.
    """

    places: tuple[int, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, network: Network, last: int | None = None) -> Neurons:
        """The neurons of a network, or of its operations up to a position, that one included."""
        places = tuple(place for place in network.nonlinear if last is None or place <= last)
        shapes: list[torch.Size] = []
        for place in places:
            read = network.read_shapes(place)
            shapes.append(read[0] if len(read) == 1 else torch.Size([sum(shape.numel() for shape in read)]))
        return cls(places, tuple(shapes))

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    def open(self, network: Network, bounds: Mapping[int, Bounds], like: Tensor) -> Tensor:
        """(B, N) bool, the neurons for which bounds tighter than ``bounds``, by position, improve a relaxation
        (``Nonlinear.open``): of piecewise linear operations, the unstable ones. ``like``: as for ``ends``."""
        parts = [like.new_zeros(len(like), 0, dtype=torch.bool)]
        for place in self.places:
            ends = network.split_bounds(place, bounds[place])
            parts += [part.flatten(1) for part in network.nonlinear_at(place).open(*ends)]
        return torch.cat(parts, 1)

    def apart(self, flat: Tensor) -> dict[int, Tensor]:
        """Split a flat tensor (…, N) into one (…, *shape) for each operation."""
        parts = torch.split(flat, self.sizes, -1)
        return {
            place: part.reshape(*flat.shape[:-1], *shape)
            for place, part, shape in zip(self.places, parts, self.shapes, strict=True)
        }

    def together(self, parts: Mapping[int, Tensor], leading: int = 1) -> Tensor:
        """Join the operations' tensors, with ``leading`` dimensions in front, into one (…, N)."""
        return torch.cat([parts[place].flatten(leading) for place in self.places], -1)

    def ends(self, bounds: Mapping[int, Bounds], like: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (B, N), from bounds by position; ``like`` (B, …) gives B, dtype and device."""
        none = like.new_zeros(len(like), 0)
        lower, upper = (
            torch.cat([none, *(getattr(bounds[place], end).flatten(1) for place in self.places)], -1)
            for end in ("lower", "upper")
        )
        return lower, upper


@dataclass(frozen=True)
class Columns:
    """Chosen neurons of each of D subproblems in U columns; each operation's neurons take the same range of columns.

    Args:
        neurons: (D, U) int64, numbers in the flat row of ``Neurons``; padding has the number of the operation's first
            neuron.
        real: (D, U) bool, False for padding.
        sizes: number of columns of each operation.
    """

    neurons: Tensor
    real: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, neurons: Neurons, chosen: Tensor) -> Columns:
        """The columns of the ``chosen`` neurons (D, N) bool."""
        none = torch.zeros_like(chosen[:, :0], dtype=torch.int64)
        numbers, real, sizes, first = [none], [chosen[:, :0]], list[int](), 0
        for part in torch.split(chosen, neurons.sizes, 1):
            most = int(part.sum(1).max()) if part.numel() else 0
            order = torch.argsort(part.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
            is_real = part.gather(1, order)
            numbers.append(torch.where(is_real, order, 0) + first)
            real.append(is_real)
            sizes.append(most)
            first += part.shape[1]
        return cls(torch.cat(numbers, 1), torch.cat(real, 1), tuple(sizes))

    def take(self, index: Tensor) -> Columns:
        return Columns(self.neurons[index], self.real[index], self.sizes)

    def gathered(self, values: Tensor, fill: float) -> Tensor:
        """The columns (D, …, U) of all neurons' values (D, …, N), ``fill`` in padding."""
        index, real = self._like(values)
        return torch.where(real, values.gather(-1, index), fill)

    def added(self, whole: Tensor, values: Tensor) -> Tensor:
        """A copy of ``whole`` (D, …, N) with the columns' ``values`` (D, …, U) added; padding is ignored."""
        index, real = self._like(values)
        return whole.scatter_add(-1, index, torch.where(real, values, 0))

    def _like(self, values: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(values), *[1] * (values.ndim - 2), self.neurons.shape[1])
        index, real = self.neurons.reshape(shape), self.real.reshape(shape)
        return index.expand(*values.shape[:-1], -1), real
