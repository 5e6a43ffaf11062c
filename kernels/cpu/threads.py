"""How numba kernels are compiled and run on several threads.

A kernel is ``kernel(first, last, *arrays)`` and works on the items [first, last); items do not share outputs, so that
results do not depend on the number of threads. The threads are torch's own, borrowed from its OpenMP runtime: after
each operation they spin for milliseconds, and any others would have to share the cores with them. (numba's layers abort
when two Python threads meet, or after a fork.) A forked child has none of its parent's threads and computes alone.
"""

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
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
Maybe: TypeAlias = Any
"""An array or None: a kernel is compiled for each, and reads what it was not given in dead branches alone."""

GRAIN = 1 << 21
"""Elementary operations below which another thread costs more than it brings: handing over takes about 50 µs."""

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def jit(function: Callable[..., Any] | None = None, *, reassociate: bool = False, inline: bool = False) -> Any:
    """Compile on first use, without the interpreter lock, kept on disk where it can be.

    ``reassociate`` lets sums be taken in another order, and products and sums be fused: for reductions, which are
    not vectorised otherwise. Nothing assumes that NaN or infinity do not occur.
    """
    if function is None:
        return partial(jit, reassociate=reassociate, inline=inline)
    options: dict[str, Any] = {
        "nogil": True, "error_model": "numpy", "inline": "always" if inline else "never",
        "fastmath": {"reassoc", "contract", "nsz"} if reassociate else {"contract"},
    }  # fmt: skip
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep it in: neither the package's nor the user's can be written
        return numba.njit(function, **options)


def run(kernel: Callable[..., Any], items: int, work: int, *arguments: Any) -> None:
    """Call ``kernel`` over all items, on as many threads as torch uses and ``work`` elementary operations deserve."""
    threads = min(torch.get_num_threads(), items, work // GRAIN)
    if threads > 1 and (team := _team()) is not None and not _forked:
        kernel(0, 0, *arguments)  # compiles here if it is new: the runtime's threads may have small stacks
        parts = min(items, 4 * threads)  # more than threads: one that wakes late, or loses its core, takes fewer
        ends = [items * part // parts for part in range(parts + 1)]
        _on_a_team(team, threads, lambda first, last: kernel(first, last, *arguments), pairwise(ends))
    elif items:
        kernel(0, items, *arguments)


def _on_a_team(
    team: Callable[..., Any], threads: int, work: Callable[[int, int], Any], parts: Iterator[tuple[int, int]]
) -> None:
    """Each thread takes parts until none is left: the runtime may give fewer threads than were asked for."""
    errors: list[BaseException] = []

    @_BODY
    def body(_: int | None) -> None:
        try:
            for part in parts:
                work(*part)
        except BaseException as error:  # it cannot cross the runtime
            errors.append(error)

    team(body, None, threads, 0)
    if errors:
        raise errors[0]


@cache
def _team() -> Callable[..., Any] | None:
    """``GOMP_parallel`` of the OpenMP runtime that torch computes with, as GNU's, LLVM's and Intel's export it."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/lib" in line}
    runtimes = [p for p in loaded if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))]
    folder = str(Path(torch.__file__).parent)  # torch and torch.libs: a wheel brings its own
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
    """The entries of a packed tensor as they lie in memory, seen in another shape."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy().reshape(shape)
