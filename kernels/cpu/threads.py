"""Compile numba kernels and run them on several threads.

A kernel ``kernel(first, last, *arrays)`` works on the items [first, last). Items do not share outputs, so results do
not depend on the number of threads. The threads are those of torch's OpenMP runtime: they spin for milliseconds after
each operation, and other threads would compete with them for the cores. numba's threading layers abort when called from
two Python threads or after a fork. A forked child has none of its parent's threads and computes on one.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numba
import numpy.typing as npt
import torch
from numba.core.caching import FunctionCache
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
Maybe: TypeAlias = Any
"""An array or None; a kernel is compiled for each case, and does not read an argument that is None."""

GRAIN = 1 << 21
"""Elementary operations per thread, below which another thread does not pay: starting one takes about 50 µs."""

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


class _Cache(FunctionCache):
    """numba's cache of compiled kernels on disk. Where it cannot be read or written, as on a full disk, kernels are
    compiled without it."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        numbas: Any = super()
        with contextlib.suppress(OSError):
            return numbas.load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        numbas: Any = super()
        try:
            numbas.save_overload(sig, data)
        except OSError:
            self.disable()
            files: Any = self._cache_file
            with contextlib.suppress(OSError):  # the index may name a file of older code, which was to be replaced
                os.unlink(files._index_path)


def jit(function: Callable[..., Any] | None = None, *, reassociate: bool = False, inline: bool = False) -> Any:
    """Compile a function on first use, without the interpreter lock, cached on disk if possible.

    ``reassociate`` allows reordered sums and fused multiply-adds, which reductions need to be vectorised. NaN and
    infinity are handled in either case.
    """
    if function is None:
        return partial(jit, reassociate=reassociate, inline=inline)
    options: dict[str, Any] = {
        "nogil": True, "error_model": "numpy", "inline": "always" if inline else "never",
        "fastmath": {"reassoc", "contract", "nsz"} if reassociate else {"contract"},
    }  # fmt: skip
    kernel: Any = numba.njit(function, **options)
    with contextlib.suppress(RuntimeError):  # no cache: neither the package's folder nor the user's is writable
        kernel._cache = _Cache(function)  # what cache=True does, with numba's own class
    return kernel


def run(kernel: Callable[..., Any], items: int, work: int, *arguments: Any) -> None:
    """Run ``kernel`` over all items, on at most torch's number of threads, and one per ``GRAIN`` of ``work``."""
    threads = min(torch.get_num_threads(), items, work // GRAIN)
    if threads > 1 and (team := _team()) is not None and not _forked:
        kernel(0, 0, *arguments)  # compile here: the runtime's threads may have small stacks
        parts = min(items, 4 * threads)  # more than threads, to balance late or interrupted ones
        ends = [items * part // parts for part in range(parts + 1)]
        _on_a_team(team, threads, lambda first, last: kernel(first, last, *arguments), pairwise(ends))
    elif items:
        kernel(0, items, *arguments)


def _on_a_team(
    team: Callable[..., Any], threads: int, work: Callable[[int, int], Any], parts: Iterator[tuple[int, int]]
) -> None:
    """Let each thread take parts until none is left; the runtime may provide fewer threads than requested."""
    errors: list[BaseException] = []

    @_BODY
    def body(_: int | None) -> None:
        try:
            for part in parts:
                work(*part)
        except BaseException as error:  # an exception cannot pass through the runtime
            errors.append(error)

    team(body, None, threads, 0)
    if errors:
        raise errors[0]


@cache
def _team() -> Callable[..., Any] | None:
    """``GOMP_parallel`` of torch's OpenMP runtime, which GNU's, LLVM's and Intel's export; None if not found."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/lib" in line}
    runtimes = [p for p in loaded if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))]
    folder = str(Path(torch.__file__).parent)  # torch and torch.libs: a wheel contains its own runtime
    for path in sorted(runtimes, key=lambda p: (not p.startswith(folder), p)):
        function = getattr(ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW), "GOMP_parallel", None)
        if function is not None:
            function.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            function.restype = None
            return function
    return None


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def array(tensor: Tensor, *shape: int) -> Array:
    """A numpy view of a packed tensor's entries, in memory order, with another shape."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy().reshape(shape)
