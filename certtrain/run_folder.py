"""A run's folder. Files are written whole or not at all; lines are appended whole, and rewritten all at once."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, Unwritable, writing
from .locking import exclusive, lock_of


def temporary_of(path: Path) -> Path:
    """The temporary file beside ``path`` that this process writes before it becomes ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def clear_leftovers(path: Path) -> None:
    """Remove the temporary files of ``path`` that killed processes left. The caller holds its ``exclusive`` lock."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
    for neighbour in path.parent.iterdir():
        if name.fullmatch(neighbour.name):
            shutil.rmtree(neighbour, ignore_errors=True) if neighbour.is_dir() else neighbour.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, make it durable, and rename it to ``path``.

    The mode is that of the replaced file, or of a new file under the umask, whatever mode ``write`` sets.

    Raises:
        Unwritable: names ``path``, which is unchanged; the temporary file is removed. A device or a pipe, which a
            rename would destroy, is refused.
    """
    temporary = temporary_of(path)
    try:
        with writing(path, temporary):
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise OSError(errno.EINVAL, "no regular file")
            temporary.write_bytes(b"")
            mode = (path if path.is_file() else temporary).stat().st_mode & 0o777
            write(temporary)
            with temporary.open("rb+") as file:
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON and a newline, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class LineFile:
    """A file to which whole lines are appended. An incomplete last line does not count."""

    path: Path

    def append_text(self, lines: str) -> None:
        """Append lines and make them durable: all of them, or none if there is no room.

        Raises:
            Unwritable: names the file.
        """
        size = self.size()
        try:
            with writing(self.path), self.path.open("ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except Unwritable:
            with suppress(OSError):
                os.truncate(self.path, size)
            raise

    @contextmanager
    def exclusive(self, *, wait: bool = False) -> Iterator[None]:
        """Exclude other processes from writing this file (if the file system has locks), and create it if needed.

        Args:
            wait: wait until no other process writes.
        Raises:
            InputError: another process writes.
            Unwritable: the file cannot be appended to; raised here, before there is anything to append.
        """
        with exclusive(lock_of(self.path), str(self.path), wait=wait):
            self.append_text("")
            yield

    def drop_half_line(self) -> None:
        """Remove an incomplete last line, all text after the last newline."""
        if self.path.exists():
            whole = self.path.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end < len(whole):
                self.truncate(end)

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Keep the first ``size`` bytes.

        Raises:
            InputError: the file is shorter.
        """
        if self.size() < size:
            raise InputError(f"{self.path}: found {self.size()} bytes; accepted: the file as written, at least {size}")
        if self.path.exists():
            with writing(self.path):
                os.truncate(self.path, size)


@dataclass(frozen=True)
class JsonLines(LineFile):
    """A file with one JSON object per line."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise InputError(f"{self.path}, line {number}: not JSON; accepted: the file as written") from error

    def append(self, *records: Mapping[str, Any]) -> None:
        self.append_text("".join(map(_line, records)))

    def rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace all lines at once."""
        text = "".join(map(_line, records))
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


DESCRIPTION: dict[str, type] = {
    "config": dict, "device": str, "threads": int, "dataset.sha256": str, "dataset.shape": list, "dataset.classes": int,
}  # fmt: skip
"""Required entries of ``run.json``, with their types."""

LOCK = ".lock"


@dataclass(frozen=True)
class RunFolder:
    """The files of a run; docs/runs.md describes each one."""

    path: Path

    def exclusive(self) -> AbstractContextManager[bool]:
        """Exclude other processes from training or exporting this run.

        Verdicts, evaluations and diagnostics lock only the files that they write, so that they can run side by side.

        Raises:
            InputError: another process trains or exports the run.
        """
        return exclusive(self.path / LOCK, str(self.path))

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def best(self) -> Path:
        """The weights with the best validation score, if the recipe keeps them."""
        return self.path / "best.safetensors"

    def weights_of(self, checkpoint: str) -> Path:
        """The weight file of the ``last`` or the ``best`` checkpoint."""
        return self.best if checkpoint == "best" else self.model

    def weights_sha256(self) -> str:
        """The checksum of the last weights, part of the basis of verdicts and exports."""
        return sha256(self.model)

    @property
    def resume(self) -> Path:
        return self.path / "resume.pt"

    @property
    def metrics(self) -> JsonLines:
        return JsonLines(self.path / "metrics.jsonl")

    @property
    def onnx(self) -> Path:
        return self.path / "model.onnx"

    @property
    def specs(self) -> Path:
        """Folder of the properties, one for each exported test image."""
        return self.path / "specs"

    @property
    def instances(self) -> Path:
        """VNN-COMP's list of instances: network, property, seconds."""
        return self.path / "instances.csv"

    @property
    def abcrown(self) -> Path:
        """Settings for alpha-beta-CROWN."""
        return self.path / "abcrown.yaml"

    @property
    def sums(self) -> Path:
        """Checksums of the exported files, as ``sha256sum -c`` reads them."""
        return self.path / "SHA256SUMS"

    @property
    def verdicts(self) -> JsonLines:
        """The verdicts for the recipe's own perturbation set and arithmetic."""
        return JsonLines(self.path / "verdicts.jsonl")

    def other_verdicts(self, verifier: str, epsilon: float, arithmetic: str) -> JsonLines:
        """The verdicts of another verifier, or for another radius or arithmetic."""
        return JsonLines(self.path / "verdicts" / f"{verifier}-{epsilon!r}-{arithmetic}.jsonl")

    def proofs(self, epsilon: float, arithmetic: str) -> Path:
        """The folder of the proofs for one radius and arithmetic: a file an image, and what became of checking them."""
        return self.path / "proofs" / f"{epsilon!r}-{arithmetic}"

    @property
    def settings(self) -> JsonLines:
        """The bases of verdicts, by the name in their field ``settings``."""
        return JsonLines(self.path / "verdicts" / "settings.jsonl")

    @property
    def evaluation(self) -> Path:
        """The table of clean, attacked and IBP-certified accuracies."""
        return self.path / "evaluation.json"

    def evaluated(self, checkpoint: str, attack: str, epsilon: float) -> JsonLines:
        """The outcome for each image behind one row of that table."""
        return JsonLines(self.path / "evaluation" / f"{checkpoint}-{attack}-{epsilon!r}.jsonl")

    @classmethod
    def create(cls, path: Path, description: Mapping[str, Any]) -> RunFolder:
        """Begin a run in a new or empty folder; ``run.json`` is its first file.

        Raises:
            InputError: the folder already holds something.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            folder._refuse_contents()
        except OSError as error:
            raise InputError(f"{path}: cannot be made a folder ({error.strerror}); accepted: --out DIR") from error
        with folder.exclusive():
            folder._refuse_contents()  # another process may have begun a run meanwhile
            write_json(folder.run, description)
        return folder

    def _refuse_contents(self) -> None:
        if any(path.name != LOCK for path in self.path.iterdir()):
            what = "a run" if self.run.exists() else "other files"
            hint = f", or --resume {self.path}" if what == "a run" else ""
            raise InputError(f"{self.path}: found {what}; accepted: --out with a new or empty folder{hint}")

    def describe(self, section: str, content: Mapping[str, Any]) -> None:
        """Add or replace a section of ``run.json``."""
        write_json(self.run, {**self.open(self.path)[1], section: content})

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, dict[str, Any]]:
        """An existing run and its description.

        Raises:
            InputError: there is no ``run.json``, or it cannot be read.
        """
        folder = cls(path)
        try:
            description = json.loads(folder.run.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: found no run.json; accepted: the folder of a run") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{folder.run}: cannot be read ({error}); accepted: the file as written") from error
        for section, kind in DESCRIPTION.items():
            value: Any = description
            for key in section.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if not isinstance(value, kind):
                raise InputError(f"{folder.run}: {section}: found {value!r}; accepted: the file as written")
        return folder, description

    def final(self) -> dict[str, Any] | None:
        """The last line of a finished run's metrics, else None."""
        lines = list(self.metrics)
        return lines[-1] if lines and lines[-1].get("kind") == "final" else None
