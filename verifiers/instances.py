"""A folder of VNN-COMP instances, line by line into a table; stopped at any moment and taken up again."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..bounds.clock import OutOfTime, now, until
from ..errors import InputError, check
from ..run_folder import LineFile
from .limits import out_of_memory
from .onnx_network import OnnxNetwork, read_onnx
from .settings import Arithmetic
from .vnncomp import RESULTS, Answer, check_property, present
from .vnnlib_reader import read_property


class Instance(NamedTuple):
    """A line: names as they stand there, relative to the table's folder; seconds."""

    network: str
    property: str
    timeout: float


def read_instances(path: str | Path) -> list[Instance]:
    """The lines ``onnx,vnnlib,seconds`` of a table without a header.

    Raises:
        InputError: it cannot be read, or has another line.
    """
    path, found = Path(path), list[Instance]()
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: found {error}; accepted: lines of onnx,vnnlib,seconds") from error
    for number, row in enumerate(rows, start=1):
        try:
            network, property, timeout = (word.strip() for word in row)
            found.append(Instance(network, property, float(timeout)))
        except ValueError:
            found.append(Instance("", "", 0.0))
        if not found[-1].network or not found[-1].property or not 0 < found[-1].timeout < float("inf"):
            raise InputError(f"{path}, line {number}: found {','.join(row)!r}; accepted: onnx,vnnlib,seconds")
    return found


def run_instances(
    path: str | Path,
    results: str | Path,
    *,
    timeout: float | None = None,
    arithmetic: Arithmetic = "nearest",
    watch: Callable[[int, int, str], object] = lambda number, count, line: None,
) -> None:
    """Answer a table's instances in order; each answer is a line ``onnx,vnnlib,status,seconds`` the moment it is known.

    Status is sat, unsat, timeout, unknown or error; an error's reason goes to ``watch``. Lines that are there are kept.

    Args:
        timeout: seconds at most, whatever the table allows.
        watch: told each instance's number, how many there are, and what is to be said of it.
    Raises:
        InputError: the table cannot be read, or ``results`` holds something else; it is left as it was.
    """
    check(timeout is None or 0 < timeout < float("inf"), "timeout", timeout, "seconds > 0")
    instances, folder, file = read_instances(path), Path(path).parent, LineFile(Path(results))
    try:
        with file.exclusive():
            done = _done(file, instances)
            reader = _Networks(folder)
            for number, instance in enumerate(instances[done:], start=done + 1):
                limit = instance.timeout if timeout is None else min(timeout, instance.timeout)
                found, why = _answered(reader, folder, instance, limit, arithmetic)
                line = f"{_names(instance)}{RESULTS[found.word]},{found.seconds:.3f}"
                file.append_text(line + "\n")
                watch(number, len(instances), f"{line}{'' if why is None else f'  ({why})'}")
    except OSError as error:
        raise InputError(f"{results}: cannot be written ({error.strerror}); accepted: a file of results") from error


def _names(instance: Instance) -> str:
    """What an answer's line begins with."""
    text = io.StringIO()
    csv.writer(text, lineterminator=",").writerow(instance[:2])
    return text.getvalue()


def _done(file: LineFile, instances: list[Instance]) -> int:
    """How many instances the results are known of. The beginning of one more answer is taken away."""
    *lines, half = file.path.read_text(encoding="utf-8", errors="replace").split("\n")
    known = [_names(instance) for instance in instances[: len(lines) + 1]]
    for number, line in enumerate([*lines, half]):
        names = known[number] if number < len(known) else None
        status, comma, _ = line[len(names or "") :].partition(",")
        good = names is not None and line.startswith(names) and status in RESULTS.values() and comma
        if number == len(lines):
            begun = [f"{names}{result}," for result in RESULTS.values()] if names else []
            good = good or not half or any(result.startswith(half) for result in begun)
        if not good:
            accepted = "a new file, or the results of these instances, in their order"
            raise InputError(f"{file.path}, line {number + 1}: found {line[:200]!r}; accepted: {accepted}")
    file.drop_half_line()
    return len(lines)


class _Networks:
    """Reads networks; lines on the same one often follow each other."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, ""
        self.network: OnnxNetwork | None = None

    def __call__(self, name: str) -> OnnxNetwork:
        if self.network is None or name != self.name:
            self.network, self.name = None, ""
            self.network, self.name = read_onnx(present(self.folder / name)), name
        return self.network


def _answered(
    networks: _Networks, folder: Path, instance: Instance, timeout: float, arithmetic: Arithmetic
) -> tuple[Answer, str | None]:
    """An answer, and what to say of it."""
    started = now()
    try:
        with until(started + timeout):
            network = networks(instance.network)
            path = present(folder / instance.property)
            property = read_property(path, network.shape.numel(), network.outputs)
            found = check_property(network, property, started + timeout, arithmetic)
        return replace(found, seconds=now() - started), found.reason
    except OutOfTime:
        return Answer("timeout", now() - started, arithmetic, "timeout"), "timeout"
    except Exception as error:  # one line's trouble must not take the others' answers away
        why = "out of memory" if out_of_memory(error) else " ".join(f"{error}".split())
        found = Answer("unknown" if out_of_memory(error) else "error", now() - started, arithmetic)
        return found, why if isinstance(error, InputError) else f"{type(error).__name__}: {why}"
