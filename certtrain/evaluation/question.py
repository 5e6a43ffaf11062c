"""The question whether images stay right against an adversary, answered by one line per image."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..attacks import in_mode, lead
from ..bounds import PerturbationSet
from ..config import unstructure
from ..data import Split
from ..ledger import Ledger, Line, Question, Report, in_fixed_batches, mistyped
from ..noise import Noise, key_of
from ..step import Batch, Step
from .adversary import DETAILS, Adversary, Outcome, rows_of


@dataclass(frozen=True)
class AdversaryQuestion(Question):
    """Whether the network stays right on each image of a split against ``adversary`` within ``ball``.

    Args:
        model: the network, on the split's device. seed: seed of the attacks.
        clean: the answers about the unchanged images, by number; images that are wrong there are not attacked. None for
            the question about the unchanged images itself.
        rests_on: checksums ``weights`` and ``data``, part of the basis of the answers.
        versions: versions that compute the answers; answers of several versions may be mixed.
        title: name in the progress display.
    """

    model: nn.Module
    split: Split
    ball: PerturbationSet
    adversary: Adversary
    seed: int
    batch_size: int
    rests_on: Mapping[str, Any]
    versions: Mapping[str, str]
    clean: Mapping[int, Line] | None = None
    title: str = "evaluating"

    fields: ClassVar[Mapping[str, type]] = {"prediction": int, "robust": bool, "seconds": float}

    @property
    def labels(self) -> list[int]:
        return self.split.labels.tolist()

    @property
    def identity(self) -> dict[str, Any]:
        """The basis without versions. Answers with another identity do not answer this question."""
        content = {"attack": self.adversary.name, "perturbation": unstructure(self.ball),
                   **attack_settings(self.adversary, self.seed, self.batch_size), **self.rests_on}  # fmt: skip
        return json.loads(json.dumps(content))

    @property
    def basis(self) -> dict[str, Any]:
        return {**self.identity, "versions": {**self.versions, **self.adversary.versions()}}

    def refuses_basis(self, basis: Line) -> str:
        identity = self.identity
        other = [key for key in identity if basis.get(key) != identity[key]]
        return f"found answers on other {', '.join(other)}; accepted: answers to this question" if other else ""

    def refuses_line(self, line: Line) -> str:
        return mistyped(line, {**self.fields, **{field: kind for field, kind in DETAILS.items() if field in line}})

    def batches(self, fresh: Sequence[int], again: Sequence[int]) -> list[list[int]]:
        return in_fixed_batches(fresh, self.batch_size)

    def answer(
        self, images: Sequence[int], deadline: float = math.inf, report: Report = lambda text: None
    ) -> Iterator[list[dict[str, Any]]]:
        started = time.perf_counter()
        index = torch.tensor(images, device=self.split.labels.device)
        batch = Batch(self.split.pixels(index), self.split.labels[index], index)
        with in_mode(self.model, training=False):
            if self.clean is None:
                with torch.no_grad():
                    logits = self.model(batch.images)
                predictions, right = logits.argmax(1).tolist(), (lead(logits, batch.labels) > 0).tolist()
            else:
                predictions = [self.clean[number]["prediction"] for number in images]
                right = [self.clean[number]["robust"] for number in images]
            rows = [row for row, holds in enumerate(right) if holds]
            lost = dict.fromkeys(range(len(images)), Outcome("clean"))
            if rows:
                part = rows_of(batch, torch.tensor(rows, device=index.device))
                step = Step.evaluation(self.ball, Noise(key_of(self.seed, "evaluate"), part.index))
                lost |= dict(zip(rows, self.adversary(self.model, part, self.ball, step), strict=True))
        seconds, name = round((time.perf_counter() - started) / len(images), 6), self.name
        yield [
            {"index": number, "label": label, "prediction": prediction, "robust": lost[row].lost_to is None,
             "lost_to": lost[row].lost_to, "unconfirmed": list(lost[row].unconfirmed), "seconds": seconds,
             "settings": name, **lost[row].details}
            for row, (number, label, prediction) in enumerate(zip(images, batch.labels.tolist(), predictions))
        ]  # fmt: skip

    def figures(self, lines: Sequence[Line]) -> str:
        after = (f"{100 * share:.2f} after {part}" for part, share in after_each(self.adversary.parts, lines).items())
        text = f"{100 * sum(line['robust'] for line in lines) / max(1, len(lines)):.2f} %"
        return f"{text} ({', '.join(after)})" if self.adversary.parts else text

    def conclusion(self, lines: Sequence[Line]) -> str:
        return f"{self.title}: {self.figures(lines)} of {len(lines)} images"


def attack_settings(adversary: Adversary, seed: int, batch_size: int) -> dict[str, Any]:
    """The settings of an attack, as a row of the table records them."""
    return {"seed": seed, **adversary.basis(batch_size)}


def versions_behind(ledger: Ledger, lines: Sequence[Line]) -> list[dict[str, str]]:
    """The versions that computed these lines; several if versions or devices changed in between."""
    used, found = {line["settings"] for line in lines}, []
    for name, basis in ledger.bases().items():
        if name in used and basis["versions"] not in found:
            found.append(basis["versions"])
    return found


def after_each(parts: Sequence[str], lines: Sequence[Line]) -> dict[str, float]:
    """The share of images that are still right after each of several successive attacks."""
    lost = Counter(line["lost_to"] for line in lines)
    left, shares = lost[None] + sum(lost[part] for part in parts), {}
    for part in parts:
        left -= lost[part]
        shares[part] = left / max(1, len(lines))
    return shares
