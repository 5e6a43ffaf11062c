"""Checks of a run's proofs by the independent checker, in parallel."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..bounds import PerturbationSet
from ..checker import VERSION
from ..data import Split
from ..errors import InputError
from ..errors import check as check_value
from ..ledger import Ledger, Line, Question, Report, images_of, mistyped
from ..run_folder import JsonLines, sha256
from ..training import StopRequest
from ..typed import as_ints
from ..verifiers.proofs import proof_name
from ..verifiers.settings import ROUNDINGS, Arithmetic
from .checked_proofs import checked
from .run import Run
from .verify import verdicts_of

TOGETHER = 16
"""Proofs that a process checks before it reports."""


@dataclass(frozen=True)
class ProofChecks:
    """The results of ``check``.

    Args:
        folder: of the proofs; ``checked.jsonl`` in it holds ``records``, one for each proof.
        images: number of images asked about; verified: those that the verifier verified.
    """

    folder: Path
    images: int
    verified: int
    records: Sequence[Line]

    @property
    def proved(self) -> int:
        return sum(line["status"] == "proved" for line in self.records)

    @property
    def rejected(self) -> int:
        return len(self.records) - self.proved

    @property
    def accuracy(self) -> float:
        """The share of the images, in [0, 1], whose proof the checker accepts for the image's own box and label."""
        return self.proved / max(1, self.images)

    def summary(self) -> dict[str, Any]:
        """For a run's last line."""
        counts = {"checked": len(self.records), "proved": self.proved, "rejected": self.rejected, "checker": VERSION}
        return {"proved_accuracy": self.accuracy, "proofs": counts}


def check(
    path: str | Path | Run,
    *,
    images: str | range | None = None,
    epsilon: float | None = None,
    arithmetic: Arithmetic | None = None,
    processes: int | None = None,
    quiet: bool = False,
) -> ProofChecks:
    """Check the proofs of a run's verified images with ``certtrain.checker``, or continue where a call stopped.

    A proof counts for an image if it is accepted, and its box contains the image's perturbation set, its label is the
    image's, by the data set.

    Args:
        path: the run's folder, or the run opened.
        images: ``"start:stop"`` or a range; None for all.
        epsilon, arithmetic: of the proofs; None for the recipe's (``real`` where that is ``nearest``).
        processes: that check at the same time; None for one for each processor.
    Raises:
        InputError: an argument cannot be used, or there is nothing to check.
        Interrupted: SIGINT or SIGTERM; the same call continues.
    """
    run = Run.open(path)
    own = run.config.certify.arithmetic
    arithmetic = arithmetic or ("real" if own == "nearest" else own)
    check_value(arithmetic in ROUNDINGS, "arithmetic", arithmetic, "real or float32, in which there are proofs")
    check_value(processes is None or processes >= 1, "processes", processes, "a whole number >= 1")
    ball = run.config.perturbation if epsilon is None else run.config.perturbation.with_epsilon(float(epsilon))
    run = run.with_config(perturbation=ball)
    folder, network = run.folder.proofs(float(ball.epsilon), arithmetic), run.exported_network()
    if network is None or not folder.is_dir():
        what = "no proofs" if network is not None else "no model.onnx of these weights"
        raise InputError(f"{folder}: found {what}; accepted: after certtrain verify {run.folder.path} --proofs")
    dataset = run.dataset()
    chosen = images_of(images, len(dataset.test))
    verified = [
        line["index"]
        for line in verdicts_of(run, arithmetic)
        if line["index"] in chosen and line["status"] == "verified"
    ]
    question = ProofQuestion(
        dataset.test, ball, network, folder, arithmetic == "float32", processes or os.cpu_count() or 1,
        {"weights": run.folder.weights_sha256(), "network": sha256(network), "data": dataset.checksum},
    )  # fmt: skip
    there = [number for number in verified if (folder / proof_name(number)).exists()]
    with StopRequest(at_once=True):
        records = Ledger(JsonLines(folder / "checked.jsonl")).ask(question, there, quiet=quiet) if there else []
    return ProofChecks(folder, len(chosen), len(verified), records)


@dataclass(frozen=True)
class ProofQuestion(Question):
    """The question whether each proof of a folder proves its image's robustness.

    Args:
        network: the ONNX file. single: whether in float32 too.
        rests_on: checksums.
    """

    split: Split
    ball: PerturbationSet
    network: Path
    folder: Path
    single: bool
    processes: int
    rests_on: Mapping[str, str]
    title = "checking"

    @property
    def labels(self) -> list[int]:
        return as_ints(self.split.labels)

    @property
    def basis(self) -> dict[str, Any]:
        return {"checker": VERSION, "float32": self.single, **self.rests_on}

    def refuses_basis(self, basis: Line) -> str:
        same = all(basis.get(name) == value for name, value in self.basis.items())
        return "" if same else "found another network or checker; accepted: these"

    def refuses_line(self, line: Line) -> str:
        return mistyped(line, {"status": str, "sha256": str, "seconds": float})

    def may_improve(self, line: Line, basis: Line) -> bool:
        return line["sha256"] != sha256(self.folder / proof_name(line["index"]))

    def batches(self, fresh: Sequence[int], again: Sequence[int]) -> list[Sequence[int]]:
        return [[*again, *fresh]]

    def answer(
        self, images: Sequence[int], deadline: float = math.inf, report: Report = lambda text: None
    ) -> Iterator[list[Line]]:
        parts = [images[first : first + TOGETHER] for first in range(0, len(images), TOGETHER)]
        if self.processes == 1 or len(parts) <= 1:
            for part in parts:
                yield self._lines(part, checked(self.network, self._files(part), self.single))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(self.processes, len(parts)), context) as pool:
            running = {pool.submit(checked, self.network, self._files(part), self.single): part for part in parts}
            try:
                for done in as_completed(running):
                    yield self._lines(running[done], done.result())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def figures(self, lines: Sequence[Line]) -> str:
        proved = sum(line["status"] == "proved" for line in lines)
        return f"proved {proved}  rejected {len(lines) - proved}"

    def conclusion(self, lines: Sequence[Line]) -> str:
        return f"checked {len(lines)} proofs  {self.figures(lines)}"

    def _files(self, images: Sequence[int]) -> list[Path]:
        return [self.folder / proof_name(number) for number in images]

    def _lines(self, images: Sequence[int], found: Sequence[Mapping[str, Any]]) -> list[Line]:
        lines: list[Line] = []
        for number, record in zip(images, found, strict=True):
            label, why = int(self.split.labels[number]), None
            if record["status"] == "proved":
                why = self._not_about(number, label)
            changes = {} if why is None else {"status": "rejected", "reason": why}
            lines.append({"index": number, "label": label, "settings": self.name, **record, **changes})
        return lines

    def _not_about(self, number: int, label: int) -> str | None:
        """Why an accepted proof says nothing about this image, if it does not."""
        try:
            with safe_open(self.folder / proof_name(number), framework="np") as file:
                claim = json.loads(file.metadata()["proof"])["claim"]
                box = [file.get_tensor(f"box.{end}") for end in ("lower", "upper")]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            return f"no claim about a box ({error})"
        if claim != {"label": label}:
            return f"a proof about {str(claim)[:60]}, not about the label {label}"
        at = torch.tensor([number], device=self.split.labels.device)
        lower, upper = (end.flatten().cpu().numpy() for end in self.ball.ends(self.split.pixels(at)))
        inside = box[0].shape == lower.shape and np.all(box[0] <= lower) and np.all(upper <= box[1])
        return None if inside else "a proof about a box that does not contain the image's"
