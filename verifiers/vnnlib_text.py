"""Text of VNN-LIB files: tokens with their lines, numbers, and refusals that name the place."""

from __future__ import annotations

import gzip
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..errors import InputError

DIGITS = 1000
"""Most digits of one decimal, and largest exponent: exact fractions take as many digits."""

DEPTH = 200
"""Most nested parentheses: formulas are walked recursively, two frames a level; by the parser of VNN-LIB 2.0 too."""
# an end of line, a comment, a string, a quoted symbol, a parenthesis, a word
TOKEN = re.compile(r'\n|;[^\n]*|"[^"]*"|\|[^|]*\||[()]|[^\s()";|]+|["|]')
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")


class Token(NamedTuple):
    """A word of a file, and its line."""

    text: str
    line: int


@dataclass(frozen=True)
class VnnlibText:
    """The text of a file, and its path for errors.

    Args:
        repaired: a note on what was repaired in it; None where nothing was.
    """

    path: Path
    text: str
    repaired: str | None = None

    @classmethod
    def read(cls, path: Path) -> VnnlibText:
        """Read a file, plain or gzipped, with or without a byte order mark.

        Raises:
            InputError: it cannot be read, or is no text.
        """
        try:
            content = path.read_bytes()
            text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: found {error}; accepted: VNN-LIB 1.0 or 2.0, as text or gzipped") from error
        return cls(path, text)

    def refuse(self, token: Token, accepted: str) -> NoReturn:
        """
        Raises:
            InputError: always; it names the file, the token and its line.
        """
        found = " ".join(token.text.split())[:60]
        raise InputError(f"{self.path}, line {token.line}: found {found!r}; accepted: {accepted}")

    def tokens(self) -> Iterator[Token]:
        """The file's tokens, without comments."""
        line = 1
        for match in TOKEN.finditer(self.text):
            word = match[0]
            if word == "\n":
                line += 1
            elif word[0] != ";":
                yield Token(word, line)
                line += word.count("\n")

    def number(self, token: Token, otherwise: str = "") -> Fraction:
        """The exact value of a decimal; ``otherwise`` is what else would be accepted in its place.

        Raises:
            InputError: no decimal, out of float64's range, or with more than ``DIGITS`` digits.
        """
        if len(token.text) <= DIGITS and NUMBER.fullmatch(token.text):
            value = Decimal(token.text)
            if value.is_zero() or (value.adjusted() >= -DIGITS and value.copy_abs() <= sys.float_info.max):
                return Fraction(value or 0)
        self.refuse(token, f"{otherwise}a decimal number of float64's range and {DIGITS} digits at most")
