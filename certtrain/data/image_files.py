"""Helpers for folders of image files: names, lists, and decoding on several threads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

BLOCK = 256
NAME = re.compile(r"\w[\w.-]*")
"""The name of a class or a file; never a path."""


def files_in(folder: Path, endings: tuple[str, ...], layout: str) -> list[str]:
    """The sorted names of a folder's files with one of these endings, in upper or lower case; at least one.

    Raises:
        InputError: there are none, or no such folder.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(endings))
    except OSError as error:
        raise missing(error, layout) from error
    if not names:
        raise InputError(f"{folder}: found no images; accepted: {layout}")
    return names


def folders_in(folder: Path, layout: str) -> list[str]:
    """The sorted names of a folder's subfolders, without hidden ones.

    Raises:
        InputError: no such folder.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise missing(error, layout) from error


def lines_of(path: Path, layout: str) -> list[str]:
    """The lines of a UTF-8 text file.

    Raises:
        InputError: it cannot be read as text.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise missing(error, layout) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error}); accepted: {layout}") from error


def missing(error: OSError, layout: str) -> InputError:
    """The ``InputError`` for a file of the layout that is not there or cannot be read."""
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return InputError(f"{error.filename}: {reason}; accepted: {layout}")


def decoded(paths: Sequence[Path], formats: tuple[str, ...], resize: Callable[[Any], Any]) -> Iterator[np.ndarray]:
    """Decode image files into blocks (B, 3, H, W) of uint8, in RGB.

    Nothing in a file is executed.

    Args:
        formats: the names of Pillow's formats that are tried.
        resize: makes an H×W image of each Pillow image.

    Raises:
        InputError: names a file that is damaged or of another format.
    """
    from PIL import Image

    def decode(path: Path) -> np.ndarray:
        try:
            with Image.open(path, formats=formats) as image:
                return np.asarray(resize(image.convert("RGB"))).transpose(2, 0, 1)
        except Exception as error:  # Pillow raises OSError, SyntaxError, DecompressionBombError, …
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: cannot be read ({reason}); accepted: a {' or '.join(formats)} image") from error

    with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes outside of Python's lock
        for first in range(0, len(paths), BLOCK):
            yield np.stack(list(threads.map(decode, paths[first : first + BLOCK])))
