"""What folders of image files share: names, lists, and decoding on several threads."""

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
"""Of a class or a file: never a path."""


def files_in(folder: Path, endings: tuple[str, ...], layout: str) -> list[str]:
    """Names of a folder's files with one of these endings, in whichever case; sorted, and at least one.

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
    """Names of a folder's folders, sorted; hidden ones are left out.

    Raises:
        InputError: no such folder.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise missing(error, layout) from error


def lines_of(path: Path, layout: str) -> list[str]:
    """
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
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return InputError(f"{error.filename}: {reason}; accepted: {layout}")


def decoded(paths: Sequence[Path], formats: tuple[str, ...], bring: Callable[[Any], Any]) -> Iterator[np.ndarray]:
    """Blocks (B, 3, H, W) of uint8: each file in RGB, then as ``bring`` (a Pillow image to one of H×W) makes it.

    Only these of Pillow's ``formats`` are tried; nothing in a file is executed.

    Raises:
        InputError: a file is damaged, or of another format; names it.
    """
    from PIL import Image

    def decode(path: Path) -> np.ndarray:
        try:
            with Image.open(path, formats=formats) as image:
                return np.asarray(bring(image.convert("RGB"))).transpose(2, 0, 1)
        except Exception as error:  # Pillow raises OSError, SyntaxError, DecompressionBombError, …
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: cannot be read ({reason}); accepted: a {' or '.join(formats)} image") from error

    with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes outside of Python's lock
        for first in range(0, len(paths), BLOCK):
            yield np.stack(list(threads.map(decode, paths[first : first + BLOCK])))
