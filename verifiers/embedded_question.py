"""The ledger's question for the embedded verifier: images go through the stages of a ``Certify`` section in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..bounds import PerturbationSet, memory
from ..config import unstructure
from ..data import Split
from ..ledger import Line, Report, in_fixed_batches
from .cascade import robustness, run_cascade
from .limits import TOTAL_TIMEOUT, Limits
from .proofs import ImageProofs
from .records import VerdictQuestion, undecided, worth_another_try
from .settings import Certify
from .stage import Replay, Stage

VERIFIER = "embedded"


@dataclass(frozen=True)
class EmbeddedQuestion(VerdictQuestion):
    """The question whether each image of a split is safe on the whole set around it, for the embedded verifier.

    Args:
        network: in evaluation mode, on the split's device.
        settings: stages and limits.
        seed: seed of the attack.
        rests_on: further entries of the basis: versions, device; ``weights`` is the network's checksum.
        replay: runs of the exported network, in which counterexamples must be wrong as well.
        proofs: writes the proofs of verified images; verified ones without are asked about again.
    """

    network: nn.Module
    split: Split
    classes: int
    ball: PerturbationSet
    settings: Certify
    seed: int
    rests_on: Mapping[str, Any]

    replay: Replay | None = None
    proofs: ImageProofs | None = None

    @property
    def basis(self) -> dict[str, Any]:
        certify = unstructure(replace(self.settings.over(self.ball), images=None))
        other = {name: version for stage in self._stages for name, version in stage.versions().items()}
        return {"certify": certify, "seed": self.seed, **other, **self.rests_on}

    @property
    def _stages(self) -> list[Stage]:
        return self.settings.build(self.seed, self.replay)

    def may_improve(self, line: Line, basis: Line) -> bool:
        lacks = self.proofs is not None and line["status"] == "verified" and self.proofs.lacks(line)
        return lacks or super().may_improve(line, basis)

    def merge(self, line: Line, before: Line | None) -> Line:
        """The new verdict; where it only failed to repeat an earlier certificate, that one."""
        if before is not None and before["status"] == "verified" and undecided(line):
            return before
        return super().merge(line, before)

    def offers_more(self, record: Line, before: Line) -> bool:
        return worth_another_try(record, self.settings.over(self.ball), before.get("certify", {}))

    def batches(self, fresh: Sequence[int], again: Sequence[int]) -> list[Sequence[int]]:
        size = self.settings.batch_size
        return [*in_fixed_batches(fresh, size), *(again[i : i + size] for i in range(0, len(again), size))]

    def answer(
        self, images: Sequence[int], deadline: float = math.inf, report: Report = lambda text: None
    ) -> Iterator[list[Line]]:
        index = torch.tensor(images, device=self.split.labels.device)
        pixels, labels = self.split.pixels(index), self.split.labels[index]
        problem = robustness(self.network, pixels, labels, index, self.classes, self.ball)
        stages, limits = self._stages, Limits(self.settings.timeout, deadline)
        with memory.within(self.settings.memory):
            verdicts = run_cascade(
                problem, stages, limits, lambda stage, n: report(f"{stage}, {n} images"), self.settings.arithmetic,
                self.proofs,
            )  # fmt: skip
        if self.proofs is not None:
            self.proofs.flush()
        yield [{**v.record(), "settings": self.name} for v in verdicts if v.reason != TOTAL_TIMEOUT]
