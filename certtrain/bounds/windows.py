"""Backward passes from entries of a convolution's output, confined to what each of them sees.

An entry at place p of some operation's output depends on a window of every earlier one: from p · jump + start on,
``size`` places. Its linear forms are 0 elsewhere, so they are carried as windows, each at a place of its own. What
reaches over the border of an image belongs to zero padding, and is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .network import Network
from .operations import Nonlinear, Operation
from .region import Region
from .window import Window, pair


@dataclass(frozen=True)
class Windows:
    """Of every operation that a convolution's output depends on."""

    network: Network
    position: int
    of: Mapping[int, Window]

    @classmethod
    def behind(cls, network: Network, position: int) -> Windows | None:
        """None where an operation on the way is not local, or windows would save less than half of the entries."""
        found = {position: Window()}
        for number in range(position, 0, -1):
            if number not in found:
                continue
            operation, window = network.operations[number], found[number]
            shapes = [network.shapes[read] for read in (number, *operation.inputs)]
            before = operation.window(window, shapes) if all(len(shape) == 3 for shape in shapes) else None
            if before is None:
                return None
            for read in operation.inputs:
                found[read] = found[read].joined(before) if read in found else before
        windows = cls(network, position, found)
        whole = sum(network.shapes[number].numel() for number in found)
        return windows if 2 * sum(windows.shape(number).numel() for number in found) < whole else None

    def shape(self, number: int, window: Window | None = None) -> torch.Size:
        return torch.Size((self.network.shapes[number][0], *(window or self.of[number]).size))

    @property
    def widest(self) -> int:
        """Numbers in the largest window."""
        return max(self.shape(number).numel() for number in self.of)

    def at(self, image: Tensor, entry: Tensor) -> View:
        """The windows of M entries: the image of each, and its number among its image's."""
        _, rows, columns = self.network.shapes[self.position]
        place = entry % (rows * columns)
        return View(self, image, entry // (rows * columns), (place // columns, place % columns))


@dataclass(frozen=True)
class View:
    """M entries, each with its windows: what ``backward`` carries forms (M, R, C, rows, columns) through."""

    windows: Windows
    image: Tensor
    channel: Tensor
    place: tuple[Tensor, Tensor]

    def units(self, like: Tensor) -> Tensor:
        """(M, 2, C, 1, 1): each entry, and its negative."""
        channels = self.windows.network.shapes[self.windows.position][0]
        unit = F.one_hot(self.channel, channels).to(like.dtype)
        return torch.stack([unit, -unit], 1)[..., None, None]

    def operation(self, number: int) -> Operation:
        """As it acts on windows, which bring their padding along."""
        return self.windows.network.operations[number].on_windows()

    def shape(self, number: int, read: int) -> torch.Size:
        """Of the forms that ``number`` makes of what it reads."""
        return self.windows.shape(read, self._part(number))

    def _part(self, number: int) -> Window:
        """The window of its inputs that an operation's own depends on."""
        network, operation = self.windows.network, self.windows.network.operations[number]
        found = operation.window(self.windows.of[number], [network.shapes[i] for i in (number, *operation.inputs)])
        assert found is not None
        return found

    def see(self, number: int, values: Tensor) -> Tensor:
        """(B, C, H, W) of an operation's output → (M, C, rows, columns), 0 where a window reaches over the border."""
        window, sizes = self.windows.of[number], values.shape[2:]
        _, *grid = self.windows.network.shapes[self.windows.position]
        before = pair(max(0, -a) for a in window.start)
        after = pair(
            max(0, (g - 1) * j + a + n - size)
            for g, j, a, n, size in zip(grid, window.jump, window.start, window.size, sizes, strict=True)
        )
        padded = F.pad(values, (before[1], after[1], before[0], after[0]))
        windows = padded.unfold(2, window.size[0], 1).unfold(3, window.size[1], 1)
        row, column = (p * j + a + b for p, j, a, b in zip(self.place, window.jump, window.start, before, strict=True))
        return windows[self.image, :, row, column]

    def fit(self, number: int, read: int, forms: Tensor) -> Tensor:
        """Forms that ``number`` made of what it reads, in that operation's own windows."""
        network, part = self.windows.network, self._part(number)
        whole = self.windows.of[read]
        if part != whole:
            (top, left), (rows, columns) = (
                pair(a - b for a, b in zip(part.start, whole.start, strict=True)),
                pair(n - m for n, m in zip(whole.size, part.size, strict=True)),
            )
            forms = F.pad(forms, (left, columns - left, top, rows - top))
        if isinstance(network.operations[read], Nonlinear):  # its lines are 0 over the border
            return forms
        return forms * self._inside(read).unsqueeze(1)

    def _inside(self, number: int) -> Tensor:
        """(M, 1, rows, columns): whether a window's places lie within the image."""
        window, sizes = self.windows.of[number], self.windows.network.shapes[number][1:]
        within: list[Tensor] = []
        for p, j, a, n, size in zip(self.place, window.jump, window.start, window.size, sizes, strict=True):
            places = (p * j + a).unsqueeze(1) + torch.arange(n, device=p.device)
            within.append((places >= 0) & (places < size))
        return within[0][:, None, :, None] & within[1][:, None, None, :]

    def region(self, region: Region) -> Region:
        return region.windows(self.image, lambda values: self.see(0, values))
