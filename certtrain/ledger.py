"""The ledger of a question about many images: answers, one line each, durable, stopped at any moment and resumed.

A ``Question`` says who answers, what the answers rest on and what a valid line is; a ``Ledger`` is the file. Whatever
ends a process, the lines that were whole stay, and the same call asks about the images that are missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .errors import InputError, check
from .progress import Progress, console
from .run_folder import JsonLines

Line = Mapping[str, Any]
"""An answer: a JSON object with ``index`` and ``label`` of its image, ``settings``, the name of what it rests on, and
the fields of its question."""

Report = Callable[[str], object]
"""Told what is being done."""

FIELDS: Mapping[str, type] = {"index": int, "label": int, "settings": str}
"""What every line holds."""

SAID_EVERY = 30.0
"""Seconds between two lines of progress where the output is a file."""


class Question(ABC):
    """What is asked about each image of a split, what its answers rest on, and who finds them."""

    title: str
    """What the progress display calls it."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[int]:
        """The label of every image of the split, by the image's number."""

    @property
    @abstractmethod
    def basis(self) -> Mapping[str, Any]:
        """What the answers are a function of, as JSON: checksums of weights and data, settings, seed, versions."""

    @property
    def name(self) -> str:
        """Eight hexadecimal digits of the basis' checksum: the value of ``settings`` in each line."""
        return hashlib.sha256(json.dumps(self.basis, sort_keys=True).encode()).hexdigest()[:8]

    @abstractmethod
    def refuses_basis(self, basis: Line) -> str:
        """Why answers that rest on ``basis`` are none to this question (``found …; accepted: …``); else empty."""

    @abstractmethod
    def refuses_line(self, line: Line) -> str:
        """What is wrong with the fields of this question in a line (``found …; accepted: …``); else empty."""

    def may_improve(self, line: Line, basis: Line) -> bool:
        """Whether to ask again about an image that has the answer ``line``, which rests on ``basis``."""
        return False

    def merge(self, line: Line, before: Line | None) -> Line:
        """The line to write: the new answer, with what is worth keeping of an earlier one."""
        return line

    @abstractmethod
    def batches(self, fresh: Sequence[int], again: Sequence[int]) -> Iterable[Sequence[int]]:
        """The images without an answer and those to be asked about again, in the batches that ``answer`` takes."""

    @abstractmethod
    def answer(
        self, images: Sequence[int], deadline: float = math.inf, report: Report = lambda text: None
    ) -> Iterator[Sequence[Line]]:
        """Answer one batch: lines in any order, some at a time, each lot as soon as it is known.

        Args:
            deadline: on the clock of ``time.perf_counter``. Images that it keeps from being answered have no line.
        """

    @abstractmethod
    def figures(self, lines: Sequence[Line]) -> str:
        """What progress says of the answers so far."""

    @abstractmethod
    def conclusion(self, lines: Sequence[Line]) -> str:
        """What is said of all answers at the end."""


@dataclass(frozen=True)
class Ledger:
    """A file of answers, and where it stands what they rest on.

    Args:
        file: of lines; the last of several on one image counts.
        shared: a file of bases, by name, that other ledgers use as well: a line whose basis the question refuses is
            an error. None: the bases are lines of ``file`` itself, with ``"kind": "settings"``; then the file is about
            one question, and begun anew where the question refuses one of them.
    """

    file: JsonLines
    shared: JsonLines | None = None

    def bases(self) -> dict[str, Line]:
        """What lines rest on, by name.

        Raises:
            InputError: a line of the file that holds them is not JSON.
        """
        lines = filter(self._is_basis, self.file) if self.shared is None else self.shared
        return {line["settings"]: line for line in lines if not mistyped(line, {"settings": str})}

    def read(self, question: Question) -> dict[int, Line]:
        """The answers, by the number of their image.

        Raises:
            InputError: a line that is no answer to this question.
        """
        known: dict[int, Line] = {}
        bases, labels = self.bases(), question.labels
        refused = {name: question.refuses_basis(basis) for name, basis in bases.items()}
        described = "an earlier line" if self.shared is None else "/".join(self.shared.path.parts[-2:])
        for number, line in enumerate(self.file, start=1):
            if self._is_basis(line):
                continue
            if not (fault := mistyped(line, FIELDS)):
                index, label, name = line["index"], line["label"], line["settings"]
                if not 0 <= index < len(labels):
                    fault = f"found index {index}; accepted: 0 to {len(labels) - 1}, the images of the data"
                elif label != labels[index]:
                    fault = f"found label {label}; accepted: label {labels[index]}"
                elif name not in bases:
                    fault = f"found settings {name!r}; accepted: what {described} describes"
                else:
                    fault = question.refuses_line(line) or refused[name]
            if fault:
                raise InputError(f"{self.file.path}, line {number}: {fault}")
            known[line["index"]] = line
        return known

    def ask(
        self, question: Question, images: Iterable[int], *, total_timeout: float | None = None, quiet: bool = False
    ) -> list[Line]:
        """Answer the question for some images; lines are made durable the moment they are known.

        An image that has a line is asked about again only where the question hopes for a better answer. At the end
        the file has one line an image, in order.

        Args:
            images: their numbers.
            total_timeout: seconds after which to stop; the next call goes on with what has no line by then.
        Returns:
            the lines of those of ``images`` that are known now, in order.
        Raises:
            InputError: an image that the split does not have, a file that holds something else, another process that
                writes it; files are as they were.
            Unwritable: no room for a line; the file holds those before it.
        """
        check(total_timeout is None or 0 < total_timeout < math.inf, "total_timeout", total_timeout, "seconds > 0")
        images, count = sorted(set(images)), len(question.labels)
        for number in images:
            check(0 <= number < count, "images", number, f"0 to {count - 1}")
        started = time.perf_counter()
        deadline = started + (total_timeout or math.inf)
        self.file.path.parent.mkdir(exist_ok=True)
        with self.file.alone():
            known, again = self._open(question, images, quiet)
            fresh = [number for number in images if number not in known]
            left = len(fresh) + len(again)
            self.file.drop_half_line()
            if left:
                self._describe(question)
            with Progress(question.title, len(images), done=len(images) - left, quiet=quiet) as progress:
                said = started
                for batch in question.batches(fresh, again):
                    for answers in question.answer(batch, deadline, progress.now):
                        lines = [question.merge(line, known.get(line["index"])) for line in answers]
                        self.file.append(*lines)
                        known |= {line["index"]: line for line in lines}
                        left -= len(lines)
                        figures = question.figures(_among(known, images))
                        progress.advance(len(lines), figures)
                        if time.perf_counter() - said > SAID_EVERY:
                            said = time.perf_counter()
                            done = f"{progress.done}/{len(images)}"
                            progress.line(f"{question.title}: {done}  {figures}  {progress.pace()}")
                    if time.perf_counter() >= deadline:
                        break
                found = _among(known, images)
                progress.line(question.conclusion(found))
            self._tidy()
        if left and total_timeout is not None and not quiet:
            console.print(f"stopped after {total_timeout:g} s with {left} images to go; the same call goes on")
        return found

    def _is_basis(self, line: Any) -> bool:
        return self.shared is None and isinstance(line, dict) and line.get("kind") == "settings"

    def _open(self, question: Question, images: Sequence[int], quiet: bool) -> tuple[dict[int, Line], list[int]]:
        """The answers that are there, and which of ``images`` to ask about again."""
        bases = self.bases()
        if self.shared is None and any(map(question.refuses_basis, bases.values())):
            if not quiet:
                console.print(f"{self.file.path}: rests on other weights or settings, begun anew")
            self.file.truncate(0)
        known = self.read(question)
        again = [n for n in images if n in known and question.may_improve(known[n], bases[known[n]["settings"]])]
        return known, again

    def _describe(self, question: Question) -> None:
        """Write down what the lines to come rest on, before the first of them is written."""
        basis = {"settings": question.name, **question.basis}
        if self.shared is not None:
            add_once(self.shared, basis, "settings")
        elif question.name not in self.bases():
            self.file.append({"kind": "settings", **basis})

    def _tidy(self) -> None:
        """Bases first, then one line an image, in order."""
        lines = list(self.file)
        bases = [line for line in lines if self._is_basis(line)]
        last = {line["index"]: line for line in lines if not self._is_basis(line)}
        ordered = [*bases, *(last[number] for number in sorted(last))]
        if ordered != lines:
            self.file.rewrite(ordered)


def _among(known: Mapping[int, Line], images: Iterable[int]) -> list[Line]:
    return [known[number] for number in images if number in known]


def add_once(file: JsonLines, record: Line, field: str) -> None:
    """Append a record unless a line of the file holds the same ``field``; wait for other processes that write there."""
    file.path.parent.mkdir(exist_ok=True)
    with file.alone(wait=True):
        file.drop_half_line()
        if record[field] not in [line.get(field) for line in file]:
            file.append(record)


def mistyped(line: Any, fields: Mapping[str, type]) -> str:
    """The first field of a line that is missing or of another type (``found …; accepted: …``); else empty."""
    for field, kind in fields.items():
        value = line.get(field) if isinstance(line, dict) else None
        if type(value) is not kind:
            return f"found {field} {value!r}; accepted: the file as written"
    return ""


def in_fixed_batches(images: Iterable[int], size: int) -> list[list[int]]:
    """Batches by the images' numbers, 0 to size - 1 in the first: a stopped call forms the same ones again."""
    return [list(batch) for _, batch in groupby(images, key=lambda number: number // size)]


def images_of(asked: str | range | None, count: int) -> range:
    """``start:stop`` of a split of ``count`` images; either end may be left out.

    Raises:
        InputError: not of that form, empty, or outside the split.
    """
    if isinstance(asked, range):
        start, stop, step = asked.start, asked.stop, asked.step
    else:
        first, colon, last = (":" if asked is None else asked).partition(":")
        words = [word.strip() for word in (first, last)]
        step = 1 if colon and all(word == "" or (word.isascii() and word.isdigit()) for word in words) else 0
        start, stop = (int(word) if step and word else default for word, default in zip(words, (0, count), strict=True))
    if step != 1 or not 0 <= start < stop <= count:
        raise InputError(f"images: found {asked!r}; accepted: start:stop with 0 <= start < stop <= {count}")
    return range(start, stop)
