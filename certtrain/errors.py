"""Errors that end a command: those of a user's input or machine, in one line and without a traceback, and stops."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Portable(BaseException):
    """Exception that survives pickle and copy with its message and attributes, whatever its constructor takes.

    Python rebuilds exceptions from ``args``, their message. A constructor with other parameters then fails in the
    process that waits for the error, and ``multiprocessing.Pool`` waits for ever. All exceptions of certtrain extend
    this class.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args, {name: _portable(value) for name, value in self.__dict__.items()})


def _rebuilt(kind: type[Portable], args: tuple[Any, ...], attributes: dict[str, Any]) -> Portable:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


def _portable(value: Any) -> Any:
    """The value itself, or its printed form if it cannot be pickled."""
    try:
        pickle.dumps(value)
    except Exception:  # each class raises its own
        return repr(value)
    return value


class InputError(Portable, ValueError):
    """Input that cannot be used.

    The message is one line that says what was found, where, and what would be accepted. The command
    line prints it and exits with code 2; in Python it is an ordinary ``ValueError``.
    """


class FieldError(InputError):
    """A field of a configured object holds a value out of its range.

    Raised by ``check`` inside ``__post_init__``; ``certtrain.config`` puts the section's path in front.
    """

    def __init__(self, field: str, found: object, accepted: str):
        self.field, self.found, self.accepted = field, found, accepted
        super().__init__(f"{field}: found {found!r}; accepted: {accepted}")


class Failure(Portable, RuntimeError):
    """A failure that the input is not to blame for. The command line prints its message and exits with code 1."""


class Interrupted(Portable):
    """A signal stopped the run, which has been saved; ``signal`` is the signal's number.

    Not an ``Exception``, so that no ``except Exception`` takes it for a failure.
    """

    def __init__(self, number: int):
        self.signal = number
        super().__init__(signal.Signals(number).name)


def check(condition: object, field: str, found: object, accepted: str) -> None:
    """Raise ``FieldError`` unless ``condition`` holds. Write conditions that NaN fails (``0 <= x``)."""
    if not condition:
        raise FieldError(field, found, accepted)


class Unwritable(OSError, InputError):
    """A file cannot be written: no space, no permission, or a read-only file system. An ``OSError`` with ``errno``,
    ``strerror`` and ``filename``."""

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written ({self.strerror}); accepted: a writable place with room for it"


@contextmanager
def writing(path: Path, *also: Path) -> Iterator[None]:
    """Name the file in each ``OSError`` of a write: most do not.

    Args:
        also: temporary files that become ``path``; errors about them name ``path``.
    Raises:
        Unwritable: instead of an ``OSError`` that names no file, ``path`` or one of ``also``. Others pass.
    """
    try:
        yield
    except Unwritable:
        raise
    except OSError as error:
        if error.filename is not None and str(error.filename) not in map(str, (path, *also)):
            raise
        raise Unwritable(error.errno or 0, error.strerror or str(error), str(path)) from error
