"""One run's folder. Every file appears whole or not at all, and lines are added, never rewritten."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, make it durable, then put it in place at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class JsonLines:
    """A file of one JSON object a line. A half-written last line is not a line."""

    path: Path

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
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records).encode())
            file.flush()
            os.fsync(file.fileno())

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Keep the first ``size`` bytes.

        Raises:
            InputError: there are fewer.
        """
        if self.size() < size:
            raise InputError(f"{self.path}: found {self.size()} bytes; accepted: the file as written, at least {size}")
        if self.path.exists():
            os.truncate(self.path, size)

    def keep(self, lines: int) -> None:
        """Keep the first ``lines`` lines."""
        if self.path.exists():
            self.truncate(sum(map(len, self.path.read_bytes().splitlines(keepends=True)[:lines])))


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null stands for both."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


DESCRIPTION: dict[str, type] = {
    "config": dict, "device": str, "threads": int, "dataset.sha256": str, "dataset.shape": list, "dataset.classes": int,
}  # fmt: skip
"""What every ``run.json`` holds, among other things."""


@dataclass(frozen=True)
class RunFolder:
    """Names the files of a run: see the README for what each one holds."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def resume(self) -> Path:
        return self.path / "resume.pt"

    @property
    def metrics(self) -> JsonLines:
        return JsonLines(self.path / "metrics.jsonl")

    @property
    def verdicts(self) -> JsonLines:
        return JsonLines(self.path / "verdicts.jsonl")

    @classmethod
    def create(cls, path: Path, description: Mapping[str, Any]) -> RunFolder:
        """A new run; ``run.json`` is its first file.

        Raises:
            InputError: the folder already holds something.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                what = "a run" if (path / "run.json").exists() else "other files"
                hint = f", or --resume {path}" if what == "a run" else ""
                raise InputError(f"{path}: found {what}; accepted: --out with a new or empty folder{hint}")
        except OSError as error:
            raise InputError(f"{path}: cannot be made a folder ({error.strerror}); accepted: --out DIR") from error
        folder = cls(path)
        text = json.dumps(description, indent=2) + "\n"
        write_atomically(folder.run, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return folder

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
