"""Reads properties in VNN-LIB, of the version that the file's header says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from .vnnlib import Property, VnnlibQuery
from .vnnlib_first import FirstQuery
from .vnnlib_text import Token, VnnlibText

HEADER = re.compile(r"((?:\s|;[^\n]*\n)*)\(\s*vnnlib-version\b([^()]*)\)?")
VERSION = re.compile(r"(<?)([12])\.[0-9]+(>?)")


def read_property(path: str | Path, inputs: int, outputs: int) -> Property:
    """Read the property in a VNN-LIB file, plain or gzipped, for networks with so many inputs and outputs in all,
    flattened; hidden tensors count as outputs.

    Raises:
        InputError: a file that cannot be read, or of another version; what the reader of its version refuses.
    """
    return read_query(path).property(inputs, outputs)


def read_query(path: str | Path) -> VnnlibQuery:
    """Read the query in a VNN-LIB file, plain or gzipped, as far as it can be without its networks.

    A file that begins with ``(vnnlib-version <2.0>)`` is read as VNN-LIB 2.0, also where the brackets around the
    version are missing, which the property then notes; one without such a line as VNN-LIB 1.0.

    Raises:
        InputError: a file that cannot be read, or of another version; declarations that VNN-LIB 2.0 does not have.
    """
    source = VnnlibText.read(Path(path))
    header = HEADER.match(source.text)
    if header is None:
        return FirstQuery(source)
    word = header[2].strip()
    version, line = VERSION.fullmatch(word), 1 + source.text.count("\n", 0, header.start(2))
    if version is None:
        source.refuse(Token(f"vnnlib-version {word}", line), "(vnnlib-version <2.0>), or none in front of VNN-LIB 1.0")
    rest = "\n" * header[2].count("\n") + source.text[header.end() :]
    if version[2] == "1":
        return FirstQuery(replace(source, text=header[1] + rest))
    from .vnnlib_second import SecondQuery  # vnnlib is loaded where a file needs it

    whole = version[1] and version[3]
    note = None if whole else f"{source.path}, line {line}: found {word!r}, read as (vnnlib-version <2.0>)"
    return SecondQuery(replace(source, text=f"{header[1]}(vnnlib-version <2.0>){rest}", repaired=note))
