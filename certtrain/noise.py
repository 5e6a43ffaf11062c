"""Keyed random numbers: each is a function of its key, independent of the numbers drawn before.

Data order, augmentation and evaluation attacks are keyed by (seed, epoch, sample index), training noise
by (seed, step, position in the global batch). Results are therefore the same bits after an interruption,
and depend on the batch size or number of processes only through float rounding.

The generator is splitmix64's finaliser (Steele, Lea and Flood 2014) used as a counter-based hash; int64
tensors wrap around on every device, so CPU and GPU draw the same bits.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def key_of(*parts: int | str) -> int:
    """A signed 64-bit key of words and numbers, stable across machines and versions."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)  # a logical shift; int64's own is arithmetic


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _MIX_1
    bits = (bits ^ _shift(bits, 27)) * _MIX_2
    return bits ^ _shift(bits, 31)


@dataclass(frozen=True)
class Noise:
    """Random numbers for a batch, with an independent stream for each sample.

    Args:
        key: ``key_of(seed, …)``.
        positions: (B,) int64, the keys of the streams: the sample's index in the data set, or its position
            in the global batch.
    """

    key: int
    positions: Tensor

    def _bits(self, shape: tuple[int, ...], stream: str) -> Tensor:
        count = math.prod(shape)
        device = self.positions.device
        rows = _mix(self.positions * _GOLDEN + key_of(self.key, stream))
        columns = torch.arange(1, count + 1, device=device) * _GOLDEN
        return _mix(rows[:, None] + columns).reshape(len(self.positions), *shape)

    def uniform(self, shape: tuple[int, ...], stream: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) numbers uniform in [0, 1): multiples of 2^-24 in float32, 2^-53 in float64."""
        digits = 1 - round(math.log2(torch.finfo(dtype).eps))  # bits that the dtype holds exactly below 1
        return _shift(self._bits(shape, stream), 64 - digits).to(dtype) * 2.0**-digits

    def normal(self, shape: tuple[int, ...], stream: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) standard normal numbers (Box and Muller)."""
        first, second = (self.uniform(shape, f"{stream}/{part}", torch.float64) for part in ("radius", "angle"))
        return (torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * torch.pi * second)).to(dtype)

    def integers(self, high: int, shape: tuple[int, ...] = (), stream: str = "") -> Tensor:
        """(B, *shape) int64 numbers uniform in {0, …, high - 1} (bias below 2^-30 if ``high`` is below 2^20)."""
        return (self.uniform(shape, stream, torch.float64) * high).long()


def permutation(count: int, *key: int | str) -> Tensor:
    """A keyed permutation of ``range(count)``, int64 on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(key_of(*key) & (2**63 - 1)))
