"""Durable answers to one question about many images, one line each, resumable at any moment.

A ``Question`` defines how images are answered, what the answers depend on and which lines are valid; a ``Ledger`` is
the file. However a process ends, complete lines stay, and the same call answers the images that are missing.
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
"""An answer: a JSON object with ``index`` and ``label`` of its image, ``settings``, the name of its basis, and the
fields of its question."""

Report = Callable[[str], object]
"""Callback that receives a description of the current activity."""

FIELDS: Mapping[str, type] = {"index": int, "label": int, "settings": str}
"""Fields of every line, with their types."""

LINE_INTERVAL = 30.0
"""Seconds between two progress lines if the output is a file."""


class Question(ABC):
    """A question about each image of a split, the basis of its answers, and how they are found."""

    title: str
    """Name in the progress display."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[int]:
        """The label of every image of the split, by the image's number."""

    @property
    @abstractmethod
    def basis(self) -> Mapping[str, Any]:
        """Everything the answers depend on, as JSON: checksums of weights and data, settings, seed, versions."""

    @property
    def name(self) -> str:
        """Name of the basis, eight hexadecimal digits of its checksum: the value of ``settings`` in each line."""
        return hashlib.sha256(json.dumps(self.basis, sort_keys=True).encode()).hexdigest()[:8]

    @abstractmethod
    def refuses_basis(self, basis: Line) -> str:
        """The reason why answers with this basis do not answer this question (``found …; accepted: …``), or ``""``."""

    @abstractmethod
    def refuses_line(self, line: Line) -> str:
        """The fault in this question's fields of a line (``found …; accepted: …``), or ``""``."""

    def may_improve(self, line: Line, basis: Line) -> bool:
        """Whether an image that has the answer ``line`` with this ``basis`` should be asked again."""
        return False

    def merge(self, line: Line, before: Line | None) -> Line:
        """The line to write: the new answer, merged with the earlier one ``before`` if there is one."""
        return line

    @abstractmethod
    def batches(self, fresh: Sequence[int], again: Sequence[int]) -> Iterable[Sequence[int]]:
        """Batches for ``answer`` of the images without an answer (``fresh``) and of those to ask ``again``."""

    @abstractmethod
    def answer(
        self, images: Sequence[int], deadline: float = math.inf, report: Report = lambda text: None
    ) -> Iterator[Sequence[Line]]:
        """Answer one batch. Yields lists of lines in any order, each as soon as it is known.

        Args:
            deadline: value of ``time.perf_counter`` after which images are left without a line.
            report: receives descriptions of the current activity.
        """

    @abstractmethod
    def figures(self, lines: Sequence[Line]) -> str:
        """Figures of the answers so far, for the progress display."""

    @abstractmethod
    def conclusion(self, lines: Sequence[Line]) -> str:
        """Summary of all answers, printed at the end."""


@dataclass(frozen=True)
class Ledger:
    """A file of answers, and the file that holds their bases.

    Args:
        file: the answers; of several lines about one image the last counts.
        shared: a file of bases that other ledgers use as well; a line whose basis the question refuses is an error.
            None: the bases are lines of ``file`` itself, with ``"kind": "settings"``; the file then answers a single
            question and is started again if the question refuses one of its bases.
    """

    file: JsonLines
    shared: JsonLines | None = None

    def bases(self) -> dict[str, Line]:
        """The bases by name.

        Raises:
            InputError: a line of the file that holds them is not JSON.
        """
        lines = filter(self._is_basis, self.file) if self.shared is None else self.shared
        return {line["settings"]: line for line in lines if not mistyped(line, {"settings": str})}

    def read(self, question: Question) -> dict[int, Line]:
        """The answers, by the number of their image.

        Raises:
            InputError: a line does not answer this question.
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
        """Answer the question for some images; each line is made durable as soon as it is known.

        An image that has a line is asked again only if the question may find a better answer. At the end the file has
        one line per image, in order.

        Args:
            images: numbers of the images.
            total_timeout: seconds after which to stop; the next call continues with the images that have no line.
        Returns:
            the known lines about ``images``, in order.
        Raises:
            InputError: an image is outside the split, the file holds something else, or another process writes it;
                files are unchanged.
            Unwritable: no room for a line; the file holds the lines before it.
        """
        check(total_timeout is None or 0 < total_timeout < math.inf, "total_timeout", total_timeout, "seconds > 0")
        images, count = sorted(set(images)), len(question.labels)
        for number in images:
            check(0 <= number < count, "images", number, f"0 to {count - 1}")
        started = time.perf_counter()
        deadline = started + (total_timeout or math.inf)
        self.file.path.parent.mkdir(exist_ok=True)
        with self.file.exclusive():
            known, again = self._open(question, images, quiet)
            fresh = [number for number in images if number not in known]
            left = len(fresh) + len(again)
            self.file.drop_half_line()
            if left:
                self._describe(question)
            with Progress(question.title, len(images), done=len(images) - left, quiet=quiet) as progress:
                last_line = started
                for batch in question.batches(fresh, again):
                    for answers in question.answer(batch, deadline, progress.now):
                        lines = [question.merge(line, known.get(line["index"])) for line in answers]
                        self.file.append(*lines)
                        known |= {line["index"]: line for line in lines}
                        left -= len(lines)
                        figures = question.figures(_among(known, images))
                        progress.advance(len(lines), figures)
                        if time.perf_counter() - last_line > LINE_INTERVAL:
                            last_line = time.perf_counter()
                            done = f"{progress.done}/{len(images)}"
                            progress.line(f"{question.title}: {done}  {figures}  {progress.pace()}")
                    if time.perf_counter() >= deadline:
                        break
                answered = _among(known, images)
                progress.line(question.conclusion(answered))
            self._tidy()
        if left and total_timeout is not None and not quiet:
            console.print(f"stopped after {total_timeout:g} s with {left} images to go; the same call goes on")
        return answered

    def _is_basis(self, line: Any) -> bool:
        return self.shared is None and isinstance(line, dict) and line.get("kind") == "settings"

    def _open(self, question: Question, images: Sequence[int], quiet: bool) -> tuple[dict[int, Line], list[int]]:
        """The known answers, and those of ``images`` to ask again."""
        bases = self.bases()
        if self.shared is None and any(map(question.refuses_basis, bases.values())):
            if not quiet:
                console.print(f"{self.file.path}: rests on other weights or settings, begun anew")
            self.file.truncate(0)
        known = self.read(question)
        again = [n for n in images if n in known and question.may_improve(known[n], bases[known[n]["settings"]])]
        return known, again

    def _describe(self, question: Question) -> None:
        """Record the basis of the lines to come, before the first of them."""
        basis = {"settings": question.name, **question.basis}
        if self.shared is not None:
            add_once(self.shared, basis, "settings")
        elif question.name not in self.bases():
            self.file.append({"kind": "settings", **basis})

    def _tidy(self) -> None:
        """Rewrite the file: bases first, then one line per image, in order."""
        lines = list(self.file)
        bases = [line for line in lines if self._is_basis(line)]
        last = {line["index"]: line for line in lines if not self._is_basis(line)}
        ordered = [*bases, *(last[number] for number in sorted(last))]
        if ordered != lines:
            self.file.rewrite(ordered)


def _among(known: Mapping[int, Line], images: Iterable[int]) -> list[Line]:
    return [known[number] for number in images if number in known]


def add_once(file: JsonLines, record: Line, field: str) -> None:
    """Append a record unless a line has the same value of ``field``. Waits for other processes that write the file."""
    file.path.parent.mkdir(exist_ok=True)
    with file.exclusive(wait=True):
        file.drop_half_line()
        if record[field] not in [line.get(field) for line in file]:
            file.append(record)


def mistyped(line: Any, fields: Mapping[str, type]) -> str:
    """The first field of a line that is missing or has another type (``found …; accepted: …``), or ``""``."""
    for field, kind in fields.items():
        value = line.get(field) if isinstance(line, dict) else None
        if type(value) is not kind:
            return f"found {field} {value!r}; accepted: the file as written"
    return ""


def in_fixed_batches(images: Iterable[int], size: int) -> list[list[int]]:
    """Batches by image number, 0 to size - 1 in the first, so that a resumed call forms the same batches."""
    return [list(batch) for _, batch in groupby(images, key=lambda number: number // size)]


def images_of(selection: str | range | None, count: int) -> range:
    """The images ``start:stop`` of a split of ``count``; either end may be omitted.

    Raises:
        InputError: another form, an empty range, or one outside the split.
    """
    if isinstance(selection, range):
        start, stop, step = selection.start, selection.stop, selection.step
    else:
        first, colon, last = (":" if selection is None else str(selection)).partition(":")
        words = [word.strip() for word in (first, last)]
        step = 1 if colon and all(word == "" or (word.isascii() and word.isdigit()) for word in words) else 0
        start, stop = (int(word) if step and word else default for word, default in zip(words, (0, count), strict=True))
    if step != 1 or not 0 <= start < stop <= count:
        raise InputError(f"images: found {selection!r}; accepted: start:stop with 0 <= start < stop <= {count}")
    return range(start, stop)
