"""One process at a time. The operating system keeps the locks: whatever becomes of a process, its own end with it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InputError, writing

UNKNOWN = (ENOLCK, ENOSYS, EOPNOTSUPP)
"""What file systems answer that know no locks."""


def lock_of(path: Path) -> Path:
    """The lock file of a file or folder: its hidden neighbour."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def alone(lock: Path, what: str, *, wait: bool = False) -> Iterator[bool]:
    """Keep other processes, and other threads, from entering with the same lock file meanwhile.

    Yields whether it was possible: some network file systems know no locks, and work goes on there without. A child
    of this process does not hold the lock, and a process that was killed holds it no more.

    Args:
        lock: a file for this purpose alone, in a folder that is there; it is gone afterwards.
        what: that is being written, for the message.
        wait: until the other one is done, instead of refusing; where the lock file cannot be made, go on without, for
            then what is to be written there says why it cannot be.
    Raises:
        InputError: another one is inside; says which, and where.
        Unwritable: the lock file cannot be made.
    """
    # no soft lock where there are none of the system's: that of a killed process on another machine would stay
    own = FileLock(lock, timeout=-1 if wait else 0, fallback_to_soft=False, on_acquired=_sign)
    with writing(lock):
        try:
            os.stat(lock.parent)  # the library would make the folder
            own.acquire()
        except Timeout as error:
            said = f"{what}: found {_holder(lock)} that writes it"
            raise InputError(f"{said}; accepted: one at a time, when that one is done or has been stopped") from error
        except OSError as error:
            if not (wait or error.errno in UNKNOWN):
                raise OSError(error.errno, error.strerror) from error
            own = None
    try:
        yield own is not None
    finally:
        if own is not None:
            with suppress(OSError):
                lock.unlink()  # before it is let go: who waits for this file sees that it is gone, and makes another
            own.release()


def _sign(handle: int) -> None:
    """Write into a lock file who holds it."""
    with suppress(OSError):  # a full disk is no reason: the lock holds without
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _holder(lock: Path) -> str:
    try:
        found = json.loads(lock.read_bytes())
        return f"another process ({found['process']} on {found['host']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has just come or gone
        return "another process"
