"""Files are prepared by one process at a time, and what a killed one left behind is cleared away."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Wait until no other process is ``alone`` in that folder.

    Yields whether it was possible: some network file systems know no locks. What is prepared there twice at the same
    time costs time and nothing else, because finished files are put in place at once.

    Raises:
        InputError: there is no such folder.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # the folder itself is locked: no stray lock files
    except OSError as error:
        raise InputError(f"{folder}: cannot be opened ({error.strerror}); accepted: a folder") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


def clear_leftovers(path: Path) -> None:
    """Remove neighbours of ``path`` named by ``temporary_of`` that killed processes left; only for who is ``alone``."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
    for neighbour in path.parent.iterdir():
        if name.fullmatch(neighbour.name):
            shutil.rmtree(neighbour, ignore_errors=True) if neighbour.is_dir() else neighbour.unlink(missing_ok=True)
