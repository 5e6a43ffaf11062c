# Triton bodies: their pointers have no types, and an annotation would change what is compiled.
# pyright: basic
"""Launching of Triton kernels, and their shared arithmetic and tiling.

Half types are computed in float32. The order of sums depends on shapes only: partial sums are written to memory and
added by a second kernel, never by atomics. Nothing waits for the device.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Layout, layout_of

PROGRAMS = 1024
"""Programs that keep a large GPU busy (an H200 has 132 multiprocessors); more parts of a sum bring nothing."""
MOST_PARTS = 256
"""Largest number of partial sums per channel, which one program adds."""


def launch(
    kernel: Any, programs: int, like: Tensor, *arguments: Any, fused: bool = False, warps: int = 4, **constants: Any
) -> None:
    """Start ``programs`` instances (0 or more) on the device of ``like``.

    ``fused`` allows fused multiply-adds. It is always passed, since Triton's default has changed between versions and
    results must not depend on it.
    """
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=fused)


class Tiling(NamedTuple):
    """Tiles (channels, elements) of a packed tensor; elements count the places of all images."""

    layout: Layout
    block_c: int
    block_e: int

    @property
    def elements(self) -> int:
        return self.layout.outer * self.layout.inner

    @property
    def columns(self) -> int:
        """Number of blocks of channels."""
        return triton.cdiv(self.layout.channels, self.block_c)

    @property
    def rows(self) -> int:
        """Number of blocks of elements."""
        return triton.cdiv(self.elements, self.block_e)

    @property
    def parts(self) -> int:
        """Number of programs that share the sum over a channel."""
        return max(1, min(triton.cdiv(PROGRAMS, max(self.columns, 1)), MOST_PARTS, self.rows))

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.elements, self.layout.channels, self.layout.inner

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants of every kernel over tiles."""
        large = self.elements * self.layout.channels >= 2**31 - 2**20
        flat = self.layout.channels == 1
        return {"FLAT": flat, "WIDE": large, "BLOCK_C": self.block_c, "BLOCK_E": self.block_e}


def tiling(x: Tensor, by_channel: bool) -> Tiling:
    """Tiles of a packed tensor; without channels, one row."""
    layout = layout_of(x) if by_channel else Layout(1, 1, x.numel())
    across = layout.inner == 1 and layout.channels > 1  # channels are contiguous in memory
    block_c = min(triton.next_power_of_2(layout.channels), 64) if across else 1
    return Tiling(layout, block_c, 1024 // block_c)


ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def place(channels, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """(row of tiles, channels of this program as a column); neighbouring programs read neighbouring memory."""
    number, columns = tl.program_id(0), tl.cdiv(channels, BLOCK_C)
    if WIDE:
        number = number.to(tl.int64)
    return number // columns, (number % columns * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]


@triton.jit
def elements_of(row, BLOCK_E: tl.constexpr):
    return (row * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]


@triton.jit
def offsets(channel, element, channels, inner, FLAT: tl.constexpr):
    """Offsets of entries in an (outer, channels, inner) tensor."""
    if FLAT:
        return channel + element
    return (element // inner * channels + channel) * inner + element % inner


@triton.jit
def number(value, like):
    """A number in the dtype of ``like``. Kernels declare numbers as float64, since undeclared ones become float32."""
    return tl.full([], value, like.dtype)


@triton.jit
def wide(values):
    """float16 and bfloat16 converted to float32; other dtypes unchanged."""
    if values.dtype.primitive_bitwidth < 32:
        values = values.to(tl.float32)
    return values
