"""Reads properties in VNN-LIB, of the version that the file's header says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from .vnnlib import Property
from .vnnlib_first import read_first
from .vnnlib_text import Token, VnnlibText

HEADER = re.compile(r"((?:\s|;[^\n]*\n)*)\(\s*vnnlib-version\b([^()]*)\)?")
VERSION = re.compile(r"(<?)([12])\.[0-9]+(>?)")


def read_property(path: str | Path, inputs: int, outputs: int) -> Property:
    """Read the property in a VNN-LIB file, plain or gzipped, for a network with so many inputs and outputs, flattened.

    A file that begins with ``(vnnlib-version <2.0>)`` is read as VNN-LIB 2.0, also where the brackets around the
    version are missing, which the property then notes; one without such a line as VNN-LIB 1.0.

    Raises:
        InputError: a file that cannot be read, or of another version; what the reader of its version refuses.
    """
    source = VnnlibText.read(Path(path))
    header = HEADER.match(source.text)
    if header is None:
        return read_first(source, inputs, outputs)
    word = header[2].strip()
    version, line = VERSION.fullmatch(word), 1 + source.text.count("\n", 0, header.start(2))
    if version is None:
        source.refuse(Token(f"vnnlib-version {word}", line), "(vnnlib-version <2.0>), or none in front of VNN-LIB 1.0")
    rest = "\n" * header[2].count("\n") + source.text[header.end() :]
    if version[2] == "1":
        return read_first(replace(source, text=header[1] + rest), inputs, outputs)
    from .vnnlib_second import read_second  # vnnlib is loaded where a file needs it

    found = read_second(replace(source, text=f"{header[1]}(vnnlib-version <2.0>){rest}"), inputs, outputs)
    if version[1] and version[3]:
        return found
    return replace(found, repaired=f"{source.path}, line {line}: found {word!r}, read as (vnnlib-version <2.0>)")
