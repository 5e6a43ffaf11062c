"""Many images, one question: batch by batch into a file, stopped at any moment and taken up again."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from ..bounds import PerturbationSet
from ..config import unstructure
from ..data import Split
from ..errors import InputError, check
from ..progress import Progress, console
from ..run_folder import JsonLines
from .cascade import robustness, run_cascade
from .limits import TOTAL_TIMEOUT, Limits
from .records import Record, best_of, read_verdicts, so_far, undecided, worth_another_try
from .settings import Certify
from .stage import Replay, Stage

VERIFIER = "embedded"
SAID_EVERY = 30.0
"""Seconds between two lines of a sweep that reports to a file."""


class Asked(Protocol):
    """A question about each image of a split, and who answers it."""

    @property
    def split(self) -> Split: ...

    @property
    def basis(self) -> dict[str, Any]:
        """What its verdicts rest on: ``weights``, the network's checksum, and the rest; ``settings`` names it."""
        ...

    def offers_more(self, record: Record, before: Record) -> bool:
        """Whether an undecided image may hope for more than it has had on the basis ``before``."""
        ...

    def answers(self, fresh: Sequence[int], again: Sequence[int], deadline: float, now: Now) -> Iterator[list[Record]]:
        """Verdicts on images without one and on images to be tried again, some at a time, until ``deadline``."""
        ...


Now = Callable[[str], object]
"""Told what is being done."""


def named(content: Mapping[str, Any]) -> dict[str, Any]:
    """A basis, with its name in ``settings``."""
    text = json.dumps(content, sort_keys=True)
    return {"settings": hashlib.sha256(text.encode()).hexdigest()[:8], **content}


@dataclass(frozen=True)
class Question:
    """Is each image of a split safe on the whole set around it? The embedded verifier answers.

    Args:
        network: in evaluation mode, on the split's device.
        settings: how to find out.
        seed: of the attack.
        rests_on: what else the verdicts rest on: versions, device; ``weights`` is the network's checksum.
        replay: the exported network, which counterexamples have to fool as well.
    """

    network: nn.Module
    split: Split
    classes: int
    ball: PerturbationSet
    settings: Certify
    seed: int
    rests_on: Mapping[str, Any]

    replay: Replay | None = None

    @property
    def basis(self) -> dict[str, Any]:
        certify = unstructure(replace(self.settings.over(self.ball), images=None))
        other = {name: version for stage in self._stages for name, version in stage.versions().items()}
        return named({"certify": certify, "seed": self.seed, **other, **self.rests_on})

    @property
    def _stages(self) -> list[Stage]:
        return self.settings.build(self.seed, self.replay)

    def offers_more(self, record: Record, before: Record) -> bool:
        return worth_another_try(record, self.settings.over(self.ball), before.get("certify", {}))

    def answers(self, fresh: Sequence[int], again: Sequence[int], deadline: float, now: Now) -> Iterator[list[Record]]:
        size, name = self.settings.batch_size, self.basis["settings"]
        stages, limits = self._stages, Limits(self.settings.timeout, deadline)
        for numbers in [*_batches(fresh, size), *(again[i : i + size] for i in range(0, len(again), size))]:
            if time.perf_counter() >= deadline:
                return
            index = torch.tensor(numbers, device=self.split.labels.device)
            images, labels = self.split.pixels(index), self.split.labels[index]
            problem = robustness(self.network, images, labels, index, self.classes, self.ball)
            verdicts = run_cascade(
                problem, stages, limits, lambda stage, n: now(f"{stage}, {n} images"), self.settings.arithmetic
            )
            yield [{**v.record(), "settings": name} for v in verdicts if v.reason != TOTAL_TIMEOUT]


def sweep(
    question: Asked,
    file: JsonLines,
    settings: JsonLines,
    images: range,
    *,
    total_timeout: float | None = None,
    quiet: bool = False,
) -> list[Record]:
    """Answer the question for some images; each batch's verdicts are written the moment they are known.

    An image that ``file`` has decided is left alone, whichever settings decided it. One that it has left undecided is
    tried again where the settings now offer more; its last line counts, and at the end the file has one line an image.

    Args:
        file: of verdicts; settings: of what they rest on.
        total_timeout: seconds after which the sweep ends; what is undecided by then for this reason alone is not
            written, and the next call goes on with it.
    Returns:
        the verdicts' lines of those of ``images`` that are known now, in order.
    Raises:
        InputError: the files hold something else; they are left as they were.
    """
    check(total_timeout is None or 0 < total_timeout < math.inf, "total_timeout", total_timeout, "seconds > 0")
    started = time.perf_counter()
    file.path.parent.mkdir(exist_ok=True)
    with file.alone():
        known, fresh, again = _to_do(question, file, settings, images)
        deadline = started + (total_timeout or math.inf)
        left = len(fresh) + len(again)
        file.drop_half_line()
        if left:
            _declare(question, settings)
        with Progress("certifying", len(images), done=len(images) - left, quiet=quiet) as progress:
            said = started
            for answers in question.answers(fresh, again, deadline, progress.now):
                records = [best_of(record, known.get(record["index"])) for record in answers]
                file.append(*records)
                known |= {record["index"]: record for record in records}
                text = so_far(_among(known, images))
                progress.advance(len(records), text)
                left -= len(records)
                if time.perf_counter() - said > SAID_EVERY:
                    said = time.perf_counter()
                    progress.line(f"{progress.done}/{len(images)}  {text}  {progress.pace()}")
            found = _among(known, images)
            progress.line(f"certified {len(found)} images  {so_far(found)}")
        _tidy(file)
    if left and not quiet:
        console.print(f"stopped after {total_timeout:g} s with {left} images to go; the same call goes on")
    return found


def _to_do(question: Asked, file: JsonLines, settings: JsonLines, images: range):
    """What is known, and the images without a verdict, and those with one that can get a better one."""
    known_settings = {line["settings"]: line for line in settings if isinstance(line, dict) and "settings" in line}
    labels = question.split.labels.tolist()
    known = read_verdicts(file, labels, known_settings, question.basis["weights"])
    again = [
        n for n in images
        if n in known and undecided(known[n])
        and question.offers_more(known[n], known_settings[known[n]["settings"]])
    ]  # fmt: skip
    return known, [n for n in images if n not in known], again


def _declare(question: Asked, settings: JsonLines) -> None:
    """Say what the verdicts to come rest on, before the first of them is written."""
    settings.path.parent.mkdir(exist_ok=True)
    with settings.alone(wait=True):  # sweeps of other questions share it
        settings.drop_half_line()
        if question.basis["settings"] not in {line.get("settings") for line in settings}:
            settings.append(question.basis)


def _batches(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Images share the batch that their number puts them into, so that a stopped sweep forms the same batches."""
    batch: list[int] = []
    for number in numbers:
        if batch and batch[0] // size != number // size:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _among(known: Mapping[int, Record], images: range) -> list[Record]:
    return [known[number] for number in images if number in known]


def _tidy(file: JsonLines) -> None:
    """One line an image, in order."""
    lines = list(file)
    last = {line["index"]: line for line in lines}
    ordered = [last[number] for number in sorted(last)]
    if ordered != lines:
        file.rewrite(ordered)


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
