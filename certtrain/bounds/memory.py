"""The memory that computations may take, as the clock is the time: a stated limit, or else what the machine has.

``planned`` and ``kept`` depend on the stated limit or on the size of the machine only, never on what happens to be
free: searches take their rounds from them, and give the same results whatever else runs. ``at_once`` follows the free
memory; it may decide only how much is computed together.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import check

CHUNK = 1 << 26
"""Most bytes computed at a time on a CPU. More is slower: CROWN on a CNN7 of a quarter width took 2.4, 2.0 and 1.7 s of
processor time with 3 times 2^28, 2^26 and 2^24 bytes."""

ROUND = 1 << 29
"""Most bytes that a round of a search computes at a time on a CPU: 512 subproblems together took 1.54 ms each, 325 took
1.60 (``oval21`` wide of VNN-COMP)."""

SHARE = 8
"""The part of all memory that the open subproblems of a search may take, one in ``SHARE``; a round takes a quarter of
it at most."""

LEAST = 1 << 28
"""Least limit that can be stated: libraries and weights alone take more on most machines."""

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip

_LIMIT: ContextVar[int | None] = ContextVar("memory", default=None)


@contextmanager
def within(limit: int | str | None) -> Generator[None]:
    """Context manager that states a limit of the process' memory in this thread; None keeps the outer one's.

    Args:
        limit: bytes, or a text that ``size_of`` reads.
    """
    token = _LIMIT.set(_LIMIT.get() if limit is None else size_of(limit))
    try:
        yield
    finally:
        _LIMIT.reset(token)


def size_of(text: int | str, name: str = "memory") -> int:
    """Bytes of a size such as ``2GiB``, ``512MiB``, ``1.5GB``, or a number of bytes.

    Raises:
        InputError: another text, or less than ``LEAST``; ``name`` is named in it.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)", str(text).strip().lower())
    unit = _UNITS.get(found[2]) if found else None
    size = int(float(found[1]) * unit) if found and unit and len(found[1]) < 30 else 0
    accepted = "a size of 256MiB or more, such as 2GiB, 512MiB, 1.5GB or a number of bytes"
    check(not isinstance(text, bool) and size >= LEAST, name, text, accepted)
    return size


def at_once(like: Tensor) -> int:
    """Bytes that may be computed together now on the device of ``like``: a chunk, or less where less is free."""
    limit = _LIMIT.get()
    if like.is_cuda:
        free, _ = torch.cuda.mem_get_info(like.device)
        free += torch.cuda.memory_reserved(like.device) - torch.cuda.memory_allocated(like.device)
        if limit is not None:
            free = min(free, limit - torch.cuda.memory_allocated(like.device))
    else:
        free = _available(int(time.monotonic())) if limit is None else limit - _resident()
    if limit is not None:
        free = max(free, limit // 64)  # where libraries and weights alone are above the limit: slowly, not never
    most = planned(like) if like.is_cuda else min(CHUNK, planned(like))
    size = max(1, int(min(free / 4, most)))
    return size if size == most else 1 << size.bit_length() - 1  # equal sizes again and again


def planned(like: Tensor) -> int:
    """Bytes that one round of a search may take on the device of ``like``; independent of what is free."""
    share = kept(like)
    return share if like.is_cuda else max(1, min(ROUND, share // 4))


def kept(like: Tensor) -> int:
    """Bytes that results may take which stay for later, on the device of ``like``; independent of what is free."""
    limit = _LIMIT.get()
    if limit is None:
        limit = torch.cuda.mem_get_info(like.device)[1] if like.is_cuda else _installed()
    return max(1, limit // SHARE)


@cache
def _installed() -> int:
    """Bytes of the machine's memory, or of this process' group where that is less."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(most for most, _ in _groups()))


@lru_cache(1)
def _available(second: int) -> int:
    """Bytes that new data can take without swapping, by the machine and by this process' group; read once a
    ``second``."""
    free = math.inf
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return int(min(free, *(most - used for most, used in _groups()), 1 << 62))


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    words = _read("/proc/self/statm").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 1 else 0


def _groups() -> list[tuple[int, int]]:
    """(limit, used) bytes of each control group around this process that has a limit, and of none at first."""
    found = [(1 << 62, 0)]
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root, files = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        if controllers:
            root, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        own = root / name.lstrip("/")
        for folder in (folder for folder in (own, *own.parents) if folder.is_relative_to(root)):
            most, used = (_read(folder / file).strip() for file in files[:2])
            if most.isdigit() and used.isdigit():
                stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                found.append((int(most), max(0, int(used) - int(stat.get(files[2], 0)))))
    return found


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
