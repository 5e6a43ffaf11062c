"""Backward passes from entries of a convolution's output, confined to each entry's receptive field.

An entry at place p of an operation's output depends on a window of every earlier one: ``size`` places from
p · jump + start on. Its linear forms are 0 elsewhere, so they are carried as windows, each at its own place. Parts of
a window outside the image belong to zero padding and are set to 0.
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
    """The windows, by position, of all operations that a convolution's output depends on."""

    network: Network
    position: int
    of: Mapping[int, Window]

    @classmethod
    def behind(cls, network: Network, position: int) -> Windows | None:
        """The windows behind ``position``; None if an operation is not local, or windows save less than half."""
        windows_of = {position: Window()}
        for number in range(position, 0, -1):
            if number not in windows_of:
                continue
            operation, window = network.operations[number], windows_of[number]
            shapes = [network.shapes[read] for read in (number, *operation.inputs)]
            before = operation.window(window, shapes) if all(len(shape) == 3 for shape in shapes) else None
            if before is None:
                return None
            for read in operation.inputs:
                windows_of[read] = windows_of[read].joined(before) if read in windows_of else before
        windows = cls(network, position, windows_of)
        whole = sum(network.shapes[number].numel() for number in windows_of)
        return windows if 2 * sum(windows.shape(number).numel() for number in windows_of) < whole else None

    def shape(self, number: int, window: Window | None = None) -> torch.Size:
        """(C, rows, columns) of an operation's window, or of another ``window`` of its output."""
        return torch.Size((self.network.shapes[number][0], *(window or self.of[number]).size))

    @property
    def widest(self) -> int:
        """Number of entries of the largest window."""
        return max(self.shape(number).numel() for number in self.of)

    def at(self, image: Tensor, entry: Tensor) -> View:
        """The windows of M entries of the output.

        Args:
            image, entry: (M,), the image of each entry, and its index in the flattened output (C, H, W).
        """
        _, rows, columns = self.network.shapes[self.position]
        place = entry % (rows * columns)
        return View(self, image, entry // (rows * columns), (place // columns, place % columns))


@dataclass(frozen=True)
class View:
    """The windows of M entries, for backward passes of forms (M, R, C, rows, columns).

    Args:
        image, channel, place: of each entry, (M,) each; ``place`` is (rows, columns).
    """

    windows: Windows
    image: Tensor
    channel: Tensor
    place: tuple[Tensor, Tensor]

    def units(self, like: Tensor) -> Tensor:
        """(M, 2, C, 1, 1): the forms of each entry and of its negative."""
        channels = self.windows.network.shapes[self.windows.position][0]
        unit = F.one_hot(self.channel, channels).to(like.dtype)
        return torch.stack([unit, -unit], 1)[..., None, None]

    def operation(self, number: int) -> Operation:
        """The operation as it acts on windows, which include their padding."""
        return self.windows.network.operations[number].on_windows()

    def shape(self, number: int, read: int) -> torch.Size:
        """(C, rows, columns) of the forms of its input ``read`` that operation ``number`` returns."""
        return self.windows.shape(read, self._part(number))

    def _part(self, number: int) -> Window:
        """The window of an operation's inputs that its own window depends on."""
        network, operation = self.windows.network, self.windows.network.operations[number]
        part = operation.window(self.windows.of[number], [network.shapes[i] for i in (number, *operation.inputs)])
        assert part is not None
        return part

    def extract(self, number: int, values: Tensor) -> Tensor:
        """Cut windows out of an operation's output: (B, C, H, W) → (M, C, rows, columns), 0 outside the image."""
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

    def align(self, number: int, read: int, forms: Tensor) -> Tensor:
        """Forms of input ``read`` from operation ``number``, padded to the windows of ``read``; 0 outside the image."""
        network, part = self.windows.network, self._part(number)
        whole = self.windows.of[read]
        if part != whole:
            (top, left), (rows, columns) = (
                pair(a - b for a, b in zip(part.start, whole.start, strict=True)),
                pair(n - m for n, m in zip(whole.size, part.size, strict=True)),
            )
            forms = F.pad(forms, (left, columns - left, top, rows - top))
        if isinstance(network.operations[read], Nonlinear):  # its relaxation is 0 outside the image
            return forms
        return forms * self._inside(read).unsqueeze(1)

    def _inside(self, number: int) -> Tensor:
        """(M, 1, rows, columns) bool: whether a window's places lie within the image."""
        window, sizes = self.windows.of[number], self.windows.network.shapes[number][1:]
        within: list[Tensor] = []
        for p, j, a, n, size in zip(self.place, window.jump, window.start, window.size, sizes, strict=True):
            places = (p * j + a).unsqueeze(1) + torch.arange(n, device=p.device)
            within.append((places >= 0) & (places < size))
        return within[0][:, None, :, None] & within[1][:, None, None, :]

    def region(self, region: Region) -> Region:
        """The region's projections to the windows of the input."""
        return region.windows(self.image, lambda values: self.extract(0, values))
