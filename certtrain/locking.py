"""Locks between processes. The operating system holds them, so that they end with their process."""

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
"""Error numbers of file systems without locks."""


def lock_of(path: Path) -> Path:
    """The lock file of a file or folder, a hidden file beside it."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def exclusive(lock: Path, what: str, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock that excludes other processes and threads with the same lock file.

    Yields whether the lock is held: on network file systems without locks the work continues without one. Child
    processes do not inherit the lock, and a killed process no longer holds it.

    Args:
        lock: path of the lock file, used for nothing else, in an existing folder; removed afterwards.
        what: name of the object that is written, for the message.
        wait: wait for the other process instead of refusing. If the lock file cannot be created, continue without a
            lock: the write itself then fails with the reason.
    Raises:
        InputError: another process holds the lock; names process and host.
        Unwritable: the lock file cannot be created.
    """
    # no soft lock as a fallback: that of a killed process on another machine would stay
    own = FileLock(lock, timeout=-1 if wait else 0, fallback_to_soft=False, on_acquired=_sign)
    with writing(lock):
        try:
            os.stat(lock.parent)  # the library would create the folder
            own.acquire()
        except Timeout as error:
            found = f"{what}: found {_holder(lock)} that writes it"
            raise InputError(f"{found}; accepted: one at a time, when that one is done or has been stopped") from error
        except OSError as error:
            if not (wait or error.errno in UNKNOWN):
                raise OSError(error.errno, error.strerror) from error
            own = None
    try:
        yield own is not None
    finally:
        if own is not None:
            with suppress(OSError):
                lock.unlink()  # before the release: a waiting process sees that it is gone and creates another
            own.release()


def _sign(handle: int) -> None:
    """Write process and host into a lock file."""
    with suppress(OSError):  # the lock holds without its text, for example on a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _holder(lock: Path) -> str:
    try:
        holder = json.loads(lock.read_bytes())
        return f"another process ({holder['process']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):  # the file was just created or removed
        return "another process"
