"""What is said on standard output and standard error never ends the work that says it.

A letter that the terminal's encoding lacks is replaced; a reader that left, as ``head`` does, is talked to no more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EIO
from typing import IO, Any


class Lasting:
    """A text stream that replaces or drops what it cannot write; all else is the stream's own.

    Args:
        own: whether nobody else writes there, so that nobody else need hear of the error.
    """

    def __init__(self, stream: IO[str], own: bool = False):
        self.stream, self.own = stream, own
        self.terminal = not stream.closed and stream.isatty()
        self.lost: OSError | ValueError | None = None
        """What first kept it from writing; a stream that was closed raises ``ValueError``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                try:
                    self.stream.write(text)
                except UnicodeEncodeError:  # its own ``encoding`` is charmap for many, which is none of them
                    encoding = getattr(self.stream, "encoding", None) or "ascii"
                    self.stream.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:
                self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    @property
    def reader_left(self) -> bool:
        """Whether nobody is there to miss what was lost: a pipe's reader, or a terminal, is gone."""
        return isinstance(self.lost, BrokenPipeError) or (
            self.terminal and isinstance(self.lost, OSError) and self.lost.errno == EIO
        )

    @property
    def missed(self) -> str | None:
        """Why something is lost that somebody may want to read; None where nothing is."""
        return None if self.reader_left or not isinstance(self.lost, OSError) else self.lost.strerror

    def _lose(self, error: OSError | ValueError) -> None:
        self.lost = error
        if self.own or self.reader_left:
            # the stream keeps what it could not write, and would raise again at the interpreter's end
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
                self.stream.flush()


@contextmanager
def lasting_streams() -> Iterator[Lasting]:
    """``sys.stdout`` and ``sys.stderr`` as ``Lasting`` ones meanwhile; streams that are closed lead nowhere.

    Yields the former. It is flushed at the end.
    """
    _fill_standard_handles()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (Lasting(nowhere if stream is None else stream, own=True) for stream in before)
        sys.stdout, sys.stderr = out, err
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before


def _fill_standard_handles() -> None:
    """The numbers 0 to 2, where they are closed: a file must not get one, because libraries write warnings there."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
