"""Output streams whose failures do not end the work.

Characters missing in the terminal's encoding are replaced; output to a reader that has left, such as ``head``, is
dropped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EIO
from typing import IO, Any


class TolerantStream:
    """Wrapper of a text stream that replaces or drops text that it cannot write; other attributes are the stream's.

    Args:
        own: whether no one else writes to the stream, so that its descriptor can be redirected after an error.
    """

    def __init__(self, stream: IO[str], own: bool = False):
        self.stream, self.own = stream, own
        self.terminal = not stream.closed and stream.isatty()
        self.lost: OSError | ValueError | None = None
        """The first error of a write; a closed stream raises ``ValueError``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                try:
                    self.stream.write(text)
                except UnicodeEncodeError:  # error.encoding is 'charmap' for many encodings: no name
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
        """Whether the reader of a pipe, or the terminal, is gone, so that nobody misses the lost text."""
        return isinstance(self.lost, BrokenPipeError) or (
            self.terminal and isinstance(self.lost, OSError) and self.lost.errno == EIO
        )

    @property
    def missed(self) -> str | None:
        """The reason why text is lost that a reader may miss; None if there is no such text."""
        return None if self.reader_left or not isinstance(self.lost, OSError) else self.lost.strerror

    def _lose(self, error: OSError | ValueError) -> None:
        self.lost = error
        if self.own or self.reader_left:
            # the stream buffers the text that it could not write, and would raise again when the interpreter ends
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
                self.stream.flush()


@contextmanager
def tolerant_streams() -> Iterator[TolerantStream]:
    """Replace ``sys.stdout`` and ``sys.stderr`` by ``TolerantStream``s; output to closed streams is dropped.

    Yields the first. Both are flushed at the end.
    """
    _fill_standard_handles()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (TolerantStream(nowhere if stream is None else stream, own=True) for stream in before)
        sys.stdout, sys.stderr = out, err
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before


def _fill_standard_handles() -> None:
    """Open closed descriptors 0 to 2: libraries write warnings there, so that no file may get these numbers."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
