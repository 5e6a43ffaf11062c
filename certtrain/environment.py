"""Machine and settings of a run: versions, device, threads, deterministic float32."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from . import __version__
from .precision import full_float32


def versions() -> dict[str, str]:
    return {"certtrain": __version__, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not tell (Windows)."""
    try:  # Linux's ru_maxrss begins with the peak of the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def reproducible(threads: int, device: torch.device) -> Iterator[None]:
    """Compute with ``threads`` CPU threads, full float32 precision, and on the CPU the same bits in every run.

    Without torch's deterministic algorithms two CPU runs of one seed differ: several threads sum the gradient of an
    indexed tensor in the order in which they arrive (seen with 2 threads). On CUDA they cost speed and guarantee
    nothing across devices. The caller's settings and generator are restored.
    """
    before = torch.get_num_threads()
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # a debugging aid that costs passes over memory
    try:
        with full_float32(), torch.random.fork_rng():
            yield
    finally:
        memory.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.set_num_threads(before)
