"""How numba kernels are compiled and run on several threads.

A kernel is ``kernel(first, last, *arrays)`` and works on the items [first, last); items do not share outputs, so that
results do not depend on the number of threads. The threads are ours, as many as torch uses: numba's own layers
abort when two Python threads meet (workqueue) or after a fork (OpenMP), and need a system library (OpenMP, TBB).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

GRAIN = 1 << 17
"""Elementary operations below which a second thread costs more than it brings: handing over takes about 50 µs."""

_pool: ThreadPoolExecutor | None = None


def jit(function: Callable | None = None, *, reassociate: bool = False, inline: bool = False) -> Any:
    """Compile on first use, without the interpreter lock, kept on disk where it can be.

    ``reassociate`` lets sums be taken in another order, and products and sums be fused: for reductions, which are
    not vectorised otherwise. Nothing assumes that NaN or infinity do not occur.
    """
    if function is None:
        return lambda f: jit(f, reassociate=reassociate, inline=inline)
    options: dict[str, Any] = {
        "nogil": True, "error_model": "numpy", "inline": "always" if inline else "never",
        "fastmath": {"reassoc", "contract", "nsz"} if reassociate else {"contract"},
    }  # fmt: skip
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder to keep it in: neither the package's nor the user's can be written
        return numba.njit(function, **options)


def run(kernel: Callable, items: int, work: int, *arguments: Any) -> None:
    """Call ``kernel`` over all items, on as many threads as torch uses and ``work`` elementary operations deserve."""
    threads = min(torch.get_num_threads(), items, work // GRAIN)
    if threads <= 1:
        if items:
            kernel(0, items, *arguments)
        return
    ends = [items * part // threads for part in range(threads + 1)]
    waiting = [_threads().submit(kernel, *part, *arguments) for part in pairwise(ends[1:])]
    kernel(0, ends[1], *arguments)
    for part in waiting:
        part.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="certtrain-kernels")
    return _pool


def _forget_threads() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_threads)  # the child has none of its parent's threads


def array(tensor: Tensor, *shape: int) -> np.ndarray:
    """The entries of a packed tensor as they lie in memory, seen in another shape."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy().reshape(shape)
