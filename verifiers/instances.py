"""Tables of VNN-COMP instances: each answer is appended as a line; a run can be stopped and resumed at any moment."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..bounds.clock import OutOfTime, now, until
from ..errors import InputError
from ..ledger import mistyped
from ..run_folder import JsonLines, LineFile
from .limits import out_of_memory
from .onnx_network import OnnxNetwork, read_onnx
from .queries import read_question
from .settings import Arithmetic, Certify
from .vnncomp import PROPERTY, RESULTS, Answer, check_files, check_property, with_limits


class Instance(NamedTuple):
    """A line of the table: file names as written, relative to the table's folder, and the timeout in seconds."""

    network: str
    property: str
    timeout: float


def read_instances(path: str | Path) -> list[Instance]:
    """Read the lines ``onnx,vnnlib,seconds`` of a table without a header.

    Raises:
        InputError: the table cannot be read, or has a line of another form.
    """
    path, instances = Path(path), list[Instance]()
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: found {error}; accepted: lines of onnx,vnnlib,seconds") from error
    for number, row in enumerate(rows, start=1):
        try:
            network, property, timeout = (word.strip() for word in row)
            instances.append(Instance(network, property, float(timeout)))
        except ValueError:
            instances.append(Instance("", "", 0.0))
        last = instances[-1]
        if not last.network or not last.property or not 0 < last.timeout < float("inf"):
            raise InputError(f"{path}, line {number}: found {','.join(row)!r}; accepted: onnx,vnnlib,seconds")
    return instances


def run_instances(
    path: str | Path,
    results: str | Path,
    *,
    timeout: float | None = None,
    arithmetic: Arithmetic | None = None,
    records: str | Path | None = None,
    certify: Certify = PROPERTY,
    watch: Callable[[int, int, str], object] = lambda number, count, line: None,
) -> None:
    """Answer a table's instances in order; append each answer to ``results`` as ``onnx,vnnlib,status,seconds`` as soon
    as it is known.

    Status is sat, unsat, timeout, unknown or error; an error's reason goes to ``watch``. Instances that ``results``
    already answers are not run again.

    Args:
        timeout: limit in seconds for each instance, besides the table's own.
        arithmetic: arithmetic of proofs; None for that of ``certify``.
        records: file to which a JSON line is appended for each answer, before its line in ``results``: the names, and
            ``Answer.record``. Of several lines about an instance the last counts.
        certify: stages and their settings; its ``timeout`` does not count.
        watch: called with each instance's number, from 1, the number of instances, and a line on its answer.
    Raises:
        InputError: the table cannot be read, or ``results`` or ``records`` holds other lines; it is then left as it
            was.
    """
    check_files(results, records)
    settings = with_limits(certify, timeout, arithmetic)
    instances, folder, file = read_instances(path), Path(path).parent, LineFile(Path(results))
    lines, where = None if records is None else JsonLines(Path(records)), results
    try:
        with file.exclusive(), contextlib.ExitStack() as stack:
            done = _count_answered(file, instances)
            if lines is not None:
                where = lines.path
                _check_records(lines)
                stack.enter_context(lines.exclusive())
                lines.drop_half_line()
            reader = _NetworkReader()
            for number, instance in enumerate(instances[done:], start=done + 1):
                limit = instance.timeout if timeout is None else min(timeout, instance.timeout)
                answer, why = _answer_instance(reader, folder, instance, replace(settings, timeout=limit))
                if lines is not None:
                    lines.append({**_names(instance), **answer.record(), "reason": why})
                line = f"{_line_start(instance)}{RESULTS[answer.word]},{answer.seconds:.3f}"
                file.append_text(line + "\n")
                notes = "; ".join(note for note in (why, answer.remark) if note is not None)
                watch(number, len(instances), f"{line}{f'  ({notes})' if notes else ''}")
    except OSError as error:
        raise InputError(f"{where}: cannot be written ({error.strerror}); accepted: a file of results") from error


def _names(instance: Instance) -> dict[str, str]:
    return {"onnx": instance.network, "vnnlib": instance.property}


RECORD = '{"onnx": '
"""The beginning of a record's line."""


def _check_records(lines: JsonLines) -> None:
    """
    Raises:
        InputError: the file holds a line, or the beginning of one, that is no record of an instance.
    """
    half = lines.path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[2] if lines.path.exists() else ""
    if not (half.startswith(RECORD) or RECORD.startswith(half)):
        raise InputError(f"{lines.path}, last line: found {half[:200]!r}; accepted: the file as written")
    for number, line in enumerate(lines, start=1):
        if fault := mistyped(line, {"onnx": str, "vnnlib": str, "answer": str}):
            raise InputError(f"{lines.path}, line {number}: {fault}")


def _line_start(instance: Instance) -> str:
    """The beginning of an answer's line: the file names, with a comma after each."""
    text = io.StringIO()
    csv.writer(text, lineterminator=",").writerow(instance[:2])
    return text.getvalue()


def _count_answered(file: LineFile, instances: list[Instance]) -> int:
    """The number of instances that the file answers. An incomplete last line is removed from it.

    Raises:
        InputError: a line that is no answer to the instance in its place.
    """
    *lines, half = file.path.read_text(encoding="utf-8", errors="replace").split("\n")
    starts = [_line_start(instance) for instance in instances[: len(lines) + 1]]
    for number, line in enumerate([*lines, half]):
        names = starts[number] if number < len(starts) else None
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


KEPT_NETWORKS = 2


class _NetworkReader:
    """Reads networks and keeps the last ones: consecutive lines often name the same."""

    def __init__(self) -> None:
        self.networks: dict[tuple[Path, tuple[str, ...], torch.dtype], OnnxNetwork] = {}

    def __call__(self, path: Path, hidden: Sequence[str], dtype: torch.dtype) -> OnnxNetwork:
        known = path, tuple(hidden), dtype
        network = self.networks.pop(known, None)
        while len(self.networks) >= KEPT_NETWORKS:  # before another is read: memory
            del self.networks[next(iter(self.networks))]
        self.networks[known] = read_onnx(path, hidden, dtype) if network is None else network
        return self.networks[known]


def _answer_instance(
    networks: _NetworkReader, folder: Path, instance: Instance, settings: Certify
) -> tuple[Answer, str | None]:
    """(answer, reason): the answer on one instance, and a reason to report; exceptions become answers."""
    started, arithmetic = now(), settings.arithmetic
    try:
        with until(started + settings.timeout):
            network, property = read_question(folder / instance.network, folder / instance.property, networks)
            answer = check_property(network, property, started + settings.timeout, settings)
        return answer.finished(started), answer.reason
    except OutOfTime:
        return Answer("timeout", 0.0, arithmetic, "timeout").finished(started), "timeout"
    except Exception as error:  # one instance's failure must not stop the others
        why = "out of memory" if out_of_memory(error) else " ".join(f"{error}".split())
        answer = Answer("unknown" if out_of_memory(error) else "error", 0.0, arithmetic).finished(started)
        return answer, why if isinstance(error, InputError) else f"{type(error).__name__}: {why}"
