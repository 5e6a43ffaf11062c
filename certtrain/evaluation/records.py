"""One question asked of many images: batch by batch into a file, stopped at any moment and taken up again."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..attacks import in_mode, lead
from ..bounds import PerturbationSet
from ..config import unstructure
from ..data import Split
from ..errors import InputError
from ..noise import Noise, key_of
from ..progress import Progress, console
from ..run_folder import JsonLines
from ..step import Batch, Step
from ..verifiers.sweep import named
from .adversary import DETAILS, Adversary, Lost, rows_of

Record = Mapping[str, Any]
FIELDS = {"index": int, "label": int, "prediction": int, "robust": bool, "seconds": float, "settings": str}
SAID_EVERY = 30.0
"""Seconds between two lines of an evaluation that reports to a file."""


@dataclass(frozen=True)
class Question:
    """Does the network stay right on each image of a split, whatever ``adversary`` does within ``ball``?

    Args:
        model: on the split's device. seed: of the attacks.
        clean: the answers about the images as they are, by number: what is wrong there is not attacked. None asks
            just this.
        rests_on: what else the answers rest on: ``weights``, ``data``, checksums.
        versions: and what computes them, which may change on the way.
    """

    model: nn.Module
    split: Split
    ball: PerturbationSet
    adversary: Adversary
    seed: int
    batch_size: int
    rests_on: Mapping[str, Any]
    versions: Mapping[str, str]
    clean: Mapping[int, Record] | None = None

    @property
    def basis(self) -> dict[str, Any]:
        """All that the answers are a function of: those of another basis are no answers to this question."""
        content = {"attack": self.adversary.name, "perturbation": unstructure(self.ball),
                   **asked_of(self.adversary, self.seed, self.batch_size), **self.rests_on}  # fmt: skip
        return json.loads(json.dumps(content))

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "settings", **named({**self.basis, "versions": {**self.versions, **self.adversary.versions()}})}

    def answers(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """A line on each of some images."""
        started = time.perf_counter()
        index = torch.tensor(numbers, device=self.split.labels.device)
        batch = Batch(self.split.pixels(index), self.split.labels[index], index)
        with in_mode(self.model, training=False):
            if self.clean is None:
                with torch.no_grad():
                    logits = self.model(batch.images)
                predictions, right = logits.argmax(1).tolist(), (lead(logits, batch.labels) > 0).tolist()
            else:
                predictions = [self.clean[number]["prediction"] for number in numbers]
                right = [self.clean[number]["robust"] for number in numbers]
            rows = [row for row, holds in enumerate(right) if holds]
            lost = dict.fromkeys(range(len(numbers)), Lost("clean"))
            if rows:
                part = rows_of(batch, torch.tensor(rows, device=index.device))
                step = Step.evaluation(self.ball, Noise(key_of(self.seed, "evaluate"), part.index))
                lost |= dict(zip(rows, self.adversary(self.model, part, self.ball, step), strict=True))
        seconds, name = round((time.perf_counter() - started) / len(numbers), 6), self.settings["settings"]
        return [
            {"index": number, "label": label, "prediction": prediction, "robust": lost[row].to is None,
             "lost_to": lost[row].to, "unconfirmed": list(lost[row].unconfirmed), "seconds": seconds, "settings": name,
             **lost[row].details}
            for row, (number, label, prediction) in enumerate(zip(numbers, batch.labels.tolist(), predictions))
        ]  # fmt: skip


def asked_of(adversary: Adversary, seed: int, batch_size: int) -> dict[str, Any]:
    """What a row of the table says of how its attack was run."""
    return {"seed": seed, **adversary.basis(batch_size)}


def versions_behind(file: JsonLines, lines: Sequence[Record]) -> list[dict[str, str]]:
    """What computed these lines of the file; more than one where versions or devices changed on the way."""
    used, found = {line["settings"] for line in lines}, []
    for described in _settings(file):
        if described["settings"] in used and described["versions"] not in found:
            found.append(described["versions"])
    return found


def measure(question: Question, file: JsonLines, images: range, title: str, *, quiet: bool = False) -> list[Record]:
    """Ask the question about some images; each batch's lines are written the moment they are known.

    Lines on these weights, data and settings are kept; a file that rests on others is begun anew.

    Args:
        title: what the progress display calls it.
    Returns:
        the lines on ``images``, in order.
    Raises:
        InputError: the file holds something else; it is left as it was.
    """
    file.path.parent.mkdir(exist_ok=True)
    with file.alone():
        known = _known(question, file)
        if known is None:
            if not quiet:
                console.print(f"{file.path}: rests on other weights or settings, begun anew")
            file.truncate(0)
            known = {}
        file.drop_half_line()
        missing = [number for number in images if number not in known]
        if missing and question.settings["settings"] not in {line.get("settings") for line in _settings(file)}:
            file.append(question.settings)
        with Progress(title, len(images), done=len(images) - len(missing), quiet=quiet) as progress:
            said = time.perf_counter()
            # by the batch that their number puts them into: a stopped evaluation forms the same batches again
            for _, group in groupby(missing, key=lambda number: number // question.batch_size):
                lines = question.answers(list(group))
                file.append(*lines)
                known |= {line["index"]: line for line in lines}
                text = _share(known, images, question.adversary.parts)
                progress.advance(len(lines), text)
                if time.perf_counter() - said > SAID_EVERY:
                    said = time.perf_counter()
                    progress.line(f"{title}: {progress.done}/{len(images)}  {text}  {progress.pace()}")
            progress.line(f"{title}: {_share(known, images, question.adversary.parts)} of {len(images)} images")
        _tidy(file)
    return [known[number] for number in images]


def _settings(file: JsonLines) -> list[Record]:
    return [line for line in file if isinstance(line, dict) and line.get("kind") == "settings"]


def _known(question: Question, file: JsonLines) -> dict[int, Record] | None:
    """``{index: line}``; None where the file rests on something else."""
    basis, labels = question.basis, question.split.labels.tolist()
    described = _settings(file)
    if any({key: line.get(key) for key in basis} != basis for line in described):
        return None
    names, known = {line.get("settings") for line in described}, {}
    for number, line in enumerate(file, start=1):
        if isinstance(line, dict) and line.get("kind") == "settings":
            continue
        where = f"{file.path}, line {number}"
        for field, kind in FIELDS.items():
            value = line.get(field) if isinstance(line, dict) else None
            if type(value) is not kind:
                raise InputError(f"{where}: found {field} {value!r}; accepted: the file as written")
        for field, kind in DETAILS.items():
            if field in line and type(line[field]) is not kind:
                raise InputError(f"{where}: found {field} {line[field]!r}; accepted: the file as written")
        if not 0 <= line["index"] < len(labels) or line["label"] != labels[line["index"]]:
            found = f"index {line['index']} with label {line['label']}"
            raise InputError(f"{where}: found {found}; accepted: images of the run's test split")
        if line["settings"] not in names:
            raise InputError(f"{where}: found settings {line['settings']!r}; accepted: what an earlier line describes")
        known[line["index"]] = line
    return known


def after_each(parts: Sequence[str], lines: Sequence[Record]) -> dict[str, float]:
    """The share of images that are right after each of several attacks, one after the other."""
    lost = Counter(line["lost_to"] for line in lines)
    left, shares = lost[None] + sum(lost[part] for part in parts), {}
    for part in parts:
        left -= lost[part]
        shares[part] = left / max(1, len(lines))
    return shares


def _share(known: Mapping[int, Record], images: range, parts: Sequence[str]) -> str:
    among = [known[number] for number in images if number in known]
    after = ", ".join(f"{100 * share:.2f} after {part}" for part, share in after_each(parts, among).items())
    text = f"{100 * sum(line['robust'] for line in among) / max(1, len(among)):.2f} %"
    return f"{text} ({after})" if after else text


def _tidy(file: JsonLines) -> None:
    """Settings first, then one line an image, in order."""
    lines, settings = list(file), _settings(file)
    last = {line["index"]: line for line in lines if line.get("kind") != "settings"}
    ordered = [*settings, *(last[number] for number in sorted(last))]
    if ordered != lines:
        file.rewrite(ordered)
