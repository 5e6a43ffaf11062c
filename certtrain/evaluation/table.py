"""The table ``evaluation.json``: a run's checkpoints against all attacks at all epsilons."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import in_mode
from ..bounds import PerturbationSet, sized
from ..data import Split
from ..errors import Failure, InputError
from ..ledger import Ledger, Line
from ..locking import exclusive, lock_of
from ..run_folder import RunFolder, sha256, write_json
from .adversary import Adversary, Clean, Intervals
from .question import AdversaryQuestion, after_each, attack_settings, versions_behind
from .settings import CHECKPOINTS, Evaluate

PLACE = ("checkpoint", "attack", "epsilon")
"""The fields that identify a row of the table."""


@dataclass(frozen=True)
class Checkpoint:
    """A network to evaluate, on the split's device, with the ``sha256`` of its file."""

    name: str
    model: nn.Module
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a run.

    Args:
        split: the test split; nothing is selected on it.
        ball: the recipe's perturbation set; all epsilons are for sets of its kind.
        data: checksum of the data set.
    """

    folder: RunFolder
    split: Split
    ball: PerturbationSet
    settings: Evaluate
    seed: int
    data: str
    versions: Mapping[str, str]

    def run(self, checkpoints: Sequence[Checkpoint], images: range, *, quiet: bool = False) -> dict[str, Any]:
        """Compute all rows and write the table, which also keeps rows of earlier calls for the same weights.

        Raises:
            InputError: as ``Evaluate.check_ball``; an attack does not support the images or networks; or a file in the
                folder is not as written.
            Contradiction: an attack broke an image that bounds certified, so that one of them is wrong.
        """
        self.settings.check_ball(self.ball)
        self.ball.check_shape(self.split.images.shape[1:])
        self._before()
        for checkpoint in checkpoints:
            self.settings.check_ball(self.ball, self._first(images), checkpoint.model)
        rows, skipped = [], []
        for checkpoint in checkpoints:
            row, clean = self._measure(checkpoint, Clean(), 0.0, images, None, quiet)
            rows.append(row)
            right = {line["index"]: line for line in clean}
            for epsilon in self.settings.sizes(self.ball):
                certified: dict[str, list[Line]] = {}
                if reason := self._refusal(checkpoint, Intervals(), self.ball.with_epsilon(epsilon), images):
                    skipped.append({
                        "checkpoint": checkpoint.name, "attack": "ibp", "epsilon": epsilon, "reason": reason,
                        "weights_sha256": checkpoint.sha256,
                    })  # fmt: skip
                else:
                    row, certified["IBP"] = self._measure(checkpoint, Intervals(), epsilon, images, right, quiet)
                    rows.append(row)
                for adversary in sorted(self.settings.adversaries(), key=lambda adversary: not adversary.certifies):
                    row, lines = self._measure(checkpoint, adversary, epsilon, images, right, quiet)
                    rows.append(row)
                    if adversary.certifies:
                        certified[adversary.name.upper()] = lines
                        continue
                    where = f"{checkpoint.name}, {adversary.name}, {sized(self.kind, epsilon)}"
                    refuse_contradictions(certified, lines, where)
        with exclusive(lock_of(self.folder.evaluation), str(self.folder.evaluation), wait=True):
            before = self._before()  # read here, because another process may have written the file
            known = {_place(row) for row in (*rows, *skipped)}
            rows, skipped = (
                [*(row for row in before[name] if _place(row) not in known), *now]
                for name, now in (("rows", rows), ("skipped", skipped))
            )
            return self._write(sorted(rows, key=_order), skipped)

    def _measure(
        self, checkpoint: Checkpoint, adversary: Adversary, epsilon: float, images: range,
        right: Mapping[int, Line] | None, quiet: bool,
    ) -> tuple[dict[str, Any], list[Line]]:  # fmt: skip
        size = "" if adversary.name == "clean" else f", {sized(self.kind, epsilon, 4)}"
        question = AdversaryQuestion(
            checkpoint.model, self.split, self.ball.with_epsilon(epsilon), adversary, self.seed,
            self.settings.batch_size, {"weights": checkpoint.sha256, "data": self.data}, self.versions, right,
            title=f"{checkpoint.name} {adversary.name}{size}",
        )  # fmt: skip
        ledger = Ledger(self.folder.evaluated(checkpoint.name, adversary.name, epsilon))
        lines = ledger.ask(question, images, quiet=quiet)
        behind = {
            "settings": attack_settings(adversary, self.seed, self.settings.batch_size),
            "versions": versions_behind(ledger, lines),
        }
        return row_of(checkpoint, adversary, epsilon, lines) | behind, lines

    @property
    def kind(self) -> str:
        return self.ball.kind

    def _refusal(self, checkpoint: Checkpoint, adversary: Adversary, ball: PerturbationSet, images: range) -> str:
        """The reason why this row cannot be computed, or ``""``."""
        with in_mode(checkpoint.model, training=False):
            return adversary.refuses(checkpoint.model, self._first(images), ball)

    def _first(self, images: range) -> Tensor:
        return self.split.pixels(torch.tensor([images.start], device=self.split.labels.device))

    def _before(self) -> dict[str, Any]:
        """The rows of the present table about weights that still exist."""
        path = self.folder.evaluation
        if not path.exists():
            return {"rows": [], "skipped": []}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            there = {name: self.folder.weights_of(name) for name in CHECKPOINTS}
            current = {name: sha256(file) for name, file in there.items() if file.exists()}
            kept: dict[str, list[dict[str, Any]]] = {"rows": [], "skipped": []}
            for name, rows in kept.items():
                for row in found[name]:
                    same = current.get(row["checkpoint"]) == row["weights_sha256"] and found["data"] == self.data
                    rows.extend([row] if same and all(map(row.__contains__, PLACE)) else [])
            return kept
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); accepted: the file as written, or none") from error

    def _write(self, rows: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> dict[str, Any]:
        found = {
            "rows": rows, "skipped": skipped, "perturbation": self.kind, "data": self.data,
            "versions": united(versions for row in rows for versions in row.get("versions", [])),
            "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(self.folder.evaluation, found)
        return found


def row_of(checkpoint: Checkpoint, adversary: Adversary, epsilon: float, lines: Sequence[Line]) -> dict[str, Any]:
    """A row of the table: the accuracy against ``adversary``.

    ``lost_to`` counts the lost images by attack, ``unconfirmed`` the images about which an attack claimed a success
    that was not confirmed. Where known: ``stages``, the accuracy after each attack of a cascade; ``changed``, the mean
    and largest number of changed units of the images that it broke; ``queries``, the mean number of queries per image.
    """
    correct = sum(line["robust"] for line in lines)
    changed, queries = ([line[name] for line in lines if name in line] for name in ("changed", "queries"))
    more: dict[str, Any] = {"stages": after_each(adversary.parts, lines)} if adversary.parts else {}
    if changed:
        more["changed"] = {"mean": statistics.fmean(changed), "max": max(changed)}
    if queries:
        more["queries"] = statistics.fmean(queries)
    return {
        "checkpoint": checkpoint.name, "attack": adversary.name, "epsilon": epsilon, "first_image": lines[0]["index"],
        "images": len(lines), "correct": correct, "accuracy": correct / len(lines),
        "lost_to": dict(Counter(line["lost_to"] for line in lines if not line["robust"]).most_common()),
        "unconfirmed": sum(bool(line["unconfirmed"]) for line in lines),
        "seconds": round(sum(line["seconds"] for line in lines), 3), "weights_sha256": checkpoint.sha256, **more,
    }  # fmt: skip


def united(versions: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """All values of each name, sorted."""
    found: dict[str, set[str]] = {}
    for name, value in (item for some in versions for item in some.items()):
        found.setdefault(name, set()).add(value)
    return {name: sorted(values) for name, values in found.items()}


def unanswered(
    folder: RunFolder, settings: Evaluate, ball: PerturbationSet, seed: int, images: int | None
) -> Iterator[tuple[str, str, float]]:
    """Checkpoint, attack and epsilon of the rows that these settings request for the first ``images`` test images and
    that ``evaluation.json`` lacks for the weights in the folder."""
    rows = {_place(row): row for row in read_rows(folder.evaluation)}
    for checkpoint in settings.checkpoints or (("last", "best") if folder.best.exists() else ("last",)):
        file = folder.weights_of(checkpoint)
        weights = sha256(file) if file.exists() else ""
        requested = [("clean", 0.0, Clean())]
        for epsilon in settings.sizes(ball):
            requested += [(adversary.name, epsilon, adversary) for adversary in settings.adversaries()]
        for attack, epsilon, adversary in requested:
            wanted = {
                "settings": attack_settings(adversary, seed, settings.batch_size), "weights_sha256": weights,
                "first_image": 0, "images": images,
            }  # fmt: skip
            row = rows.get((checkpoint, attack, epsilon), {})
            if any(row.get(name) != value for name, value in wanted.items()):
                yield checkpoint, attack, epsilon


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of ``evaluation.json``; empty if there is no such file.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if all(map(row.__contains__, PLACE))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); accepted: the file as written, or none") from error


class Contradiction(Failure):
    """A bound and an attack contradict each other."""


def refuse_contradictions(certified: Mapping[str, Sequence[Line]], attacked: Sequence[Line], where: str) -> None:
    """Check that no attack broke an image that bounds certified.

    Args:
        certified: the lines of the certified accuracies, by the name of the bounds.
    Raises:
        Contradiction: an image is both certified and broken; names the images.
    """
    for bounds, lines in certified.items():
        proved = {line["index"] for line in lines if line["robust"]}
        broken = [line["index"] for line in attacked if not line["robust"] and line["index"] in proved]
        if broken:
            text = f"{bounds} certifies the test images {broken}, which the attack breaks: one is wrong"
            raise Contradiction(f"{where}: {text}")


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[field] for field in PLACE)


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort key: checkpoint, size, rows without an attack first."""
    first = (row["attack"] != name for name in ("clean", "ibp", "crown"))
    return CHECKPOINTS.index(row["checkpoint"]), row["epsilon"], *first
