"""Networks as a table of instances names them: one file, or a list of named ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from ..errors import InputError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
"""A network's name in VNN-LIB 2.0."""

LIST = re.compile(r"""(?=\[|[({]\s*['"(\[])()(.*)|(.*?/)(\[\s*\(.*)""", re.DOTALL)
"""The beginning of a list; or a folder and a list: harnesses put the benchmark's folder in front of a column's text."""
STRING = re.compile(r"""'[^'\\\n]*'|"[^"\\\n]*\"""")
TOKEN = re.compile(rf"""\s*({STRING.pattern}|[()\[\],]|['"]?[^()\[\],]+)""")
ACCEPTED = "a file, or a list of one or more (name, file), [('f','f.onnx'),('g','g.onnx')], without escapes"


def named_networks(text: str, where: str) -> str | dict[str, str]:
    """The file that a text names, or the files by their networks' names, in order, where it is a list of pairs.

    Such a list is written as in Python, ``[('f','onnx/f.onnx'),('g','onnx/g.onnx')]``, and read by this grammar alone:
    nothing is evaluated. A folder in front of the bracket stands before each relative file.

    Raises:
        InputError: the beginning of a list that is none; a name that VNN-LIB does not have, or twice; an empty file
            name. It names ``where`` and the token.
    """
    text = text.strip()
    match = LIST.fullmatch(text)
    if match is None:
        return text
    return _List(match[2] or match[4], where).read(Path(match[1] or match[3] or ""))


def by_file(networks: str | Mapping[str, str], folder: Path) -> Path | dict[str, Path]:
    """The networks' files, with relative names taken from ``folder``."""
    if isinstance(networks, Mapping):
        return {name: folder / file for name, file in networks.items()}
    return folder / networks


class _List:
    def __init__(self, text: str, where: str):
        self.where = where
        self.tokens = self._tokens(text)
        self.token = next(self.tokens)

    def _tokens(self, text: str) -> Iterator[str]:
        place = 0
        while match := TOKEN.match(text, place):
            yield match[1].rstrip()
            place = match.end()
        yield "the end"

    def read(self, folder: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        self._take("[")
        while self.token != "]" or not found:
            self._take("(")
            name = self._quoted()
            if not NAME.fullmatch(name) or name in found:
                self._refuse(f"network {name!r}{' a second time' if name in found else ''}")
            self._take(",")
            file = self._quoted()
            if not file:
                self._refuse(f"no file for {name}")
            found[name] = str(folder / file)
            if self.token == ",":
                self._take(",")
            self._take(")")
            if self.token != "]":
                self._take(",")
        self._take("]")
        self._take("the end")
        return found

    def _take(self, accepted: str) -> str:
        """Go on behind this token."""
        if (token := self.token) != accepted:
            self._refuse(token)
        self.token = next(self.tokens, "the end")
        return token

    def _quoted(self) -> str:
        if not STRING.fullmatch(self.token):
            self._refuse(self.token)
        return self._take(self.token)[1:-1]

    def _refuse(self, found: str) -> NoReturn:
        raise InputError(
            f"{self.where}: found {' '.join(found.split())[:60]} in a list of networks; accepted: {ACCEPTED}"
        )
