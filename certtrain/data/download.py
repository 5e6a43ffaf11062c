"""Resumable downloads, checked before use; archives unpacked whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from ..errors import InputError, Unwritable, writing
from ..progress import Progress
from ..run_folder import temporary_of

BLOCK = 1 << 20
SECONDS = 60  # without a byte, before a connection is given up


def md5_of(path: Path) -> str:
    """The md5 of a file's content, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def fetch(urls: Sequence[str], path: Path, md5: str) -> None:
    """Download the file with that md5 to ``path`` from the first mirror that serves it; do nothing if it is there.

    Bytes that have arrived are kept in ``<name>.part`` beside it, and an interrupted download continues from them.

    Raises:
        InputError: no mirror serves it; ``path`` was not written.
    """
    if path.is_file() and md5_of(path) == md5:
        return
    part, reasons = path.with_name(f"{path.name}.part"), []
    for url in urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _go_on(url, part)
            found = md5_of(part)
            if found == md5:
                with writing(path, part):
                    with part.open("rb+") as file:
                        os.fsync(file.fileno())
                    os.replace(part, path)
                return
            part.unlink()
            reasons.append(f"{url}: found md5 {found}")
        except Unwritable:  # another mirror would not help; what has arrived is kept
            raise
        except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError; a bad URL a ValueError
            reasons.append(f"{url}: {' '.join(str(error).split())}")
    raise InputError(f"{path}: could not be downloaded ({'; '.join(reasons)}); accepted: a file with md5 {md5}")


def _go_on(url: str, part: Path) -> None:
    """Append the missing bytes to ``part``; start again where the server ignores ranges."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # no bytes behind the last one: the file is complete, or its md5 is wrong
            return
        raise
    with response:
        skips = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if skips else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with Progress(part.stem, total or 0, have) as progress, _opened(part, "ab" if skips else "wb") as write:
            while block := response.read(BLOCK):
                write(block)
                progress.advance(len(block))
    if total is not None and part.stat().st_size < total:
        raise OSError(f"the connection was lost after {part.stat().st_size} of {total} bytes")


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[Callable[[bytes], None]]:
    """A function that writes blocks to a file; its errors are ``Unwritable``, apart from those of the connection."""
    with writing(path):
        file = path.open(mode, buffering=0)

    def write(block: bytes) -> None:
        with writing(path):
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]

    try:
        yield write
    finally:
        file.close()


def unpack(archive: Path, folder: str, target: Path) -> None:
    """Unpack the only top-level ``folder`` of a zip to ``target``, whole or not at all.

    Raises:
        InputError: no such zip, or it holds a link, or a path that leads out of that folder.
    """
    temporary = temporary_of(target)
    try:
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                parts, kind = PurePosixPath(entry.filename).parts, stat.S_IFMT(entry.external_attr >> 16)
                inside = parts[:1] == (folder,) and ".." not in parts and "\\" not in entry.filename
                if not inside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise InputError(
                        f"{archive}: found the entry {entry.filename!r}; accepted: files and folders below {folder}/"
                    )
            file.extractall(temporary)
        os.rename(temporary / folder, target)
    except (OSError, zipfile.BadZipFile) as error:
        accepted = "a whole .zip, and room for what is in it"
        raise InputError(f"{archive}: cannot be unpacked to {target} ({error}); accepted: {accepted}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
