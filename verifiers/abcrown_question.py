"""The ledger's question for α-β-CROWN, whose answers become verdicts in our form."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..bounds import PerturbationSet
from ..data import Split
from ..ledger import Line, Report
from .abcrown import Abcrown, AbcrownAnswer, configuration
from .problem import Specification, Status
from .records import VerdictQuestion
from .stage import Replay, holds
from .vnnlib import write_property

VERIFIER = "abcrown"
ARITHMETIC = "nearest float32"


@dataclass(frozen=True)
class AbcrownQuestion(VerdictQuestion):
    """The question whether each image of a split is safe on the whole ball around it, for α-β-CROWN on the exported
    network.

    Args:
        network: ONNX file; replay: runs of that network in onnxruntime, in which every counterexample must be wrong.
        timeout: seconds for an image; device: cpu or cuda, for its process.
        logs: folder for its output.
        rests_on: further entries of the basis; ``weights`` is the network's checksum.
    """

    abcrown: Abcrown
    network: Path
    replay: Replay
    split: Split
    classes: int
    ball: PerturbationSet
    timeout: float
    device: str
    logs: Path
    rests_on: Mapping[str, Any]

    @property
    def basis(self) -> dict[str, Any]:
        own = {"verifier": VERIFIER, "timeout": self.timeout, "configuration": self.configuration}
        return {**own, **self.rests_on, "abcrown": self.abcrown.versions()}

    @property
    def configuration(self) -> Mapping[str, Any]:
        return configuration(self.timeout, self.device)

    def offers_more(self, record: Line, before: Line) -> bool:
        return record["status"] == "error" or self.timeout > before.get("timeout", 0.0)

    def batches(self, fresh: Sequence[int], again: Sequence[int]) -> list[list[int]]:
        return [[*fresh, *again]] if fresh or again else []

    def answer(
        self, images: Sequence[int], deadline: float = math.inf, report: Report = lambda text: None
    ) -> Iterator[list[Line]]:
        name = self.name
        with TemporaryDirectory(prefix="certtrain-specs-") as folder:
            properties = [Path(folder) / f"{number}.vnnlib" for number in images]
            for number, path in zip(images, properties, strict=True):
                lower, upper = self.ball.ends(self.split.pixels(torch.tensor([number])))
                write_property(path, lower[0], upper[0], int(self.split.labels[number]), self.classes)
            shape = self.split.pixels(torch.tensor([0])).shape[1:]
            report(f"α-β-CROWN, {len(images)} images")
            run = self.abcrown.run(
                self.network, properties, shape=shape, settings=self.configuration, logs=self.logs
            )  # fmt: skip
            with closing(run) as answers:
                for answer in answers:
                    yield [{**self._record(images[answer.number], answer), "settings": name}]
                    if time.perf_counter() >= deadline:
                        return

    def _record(self, number: int, answer: AbcrownAnswer) -> dict[str, Any]:
        image, label = self.split.pixels(torch.tensor([number]))[0], int(self.split.labels[number])
        prediction = int(self.replay(image)[0].argmax())
        fooled = self._fools(number, image, answer)
        status: Status = answer.status
        if status != "verified" and fooled:  # a late counterexample counts too
            status = "falsified" if prediction == label else "misclassified"
        elif status == "falsified":
            status = "unknown"
        reason = answer.reason
        if status in ("unknown", "timeout"):
            reason = "its counterexample does not replay" if answer.status == "falsified" else reason or status
        return {
            "index": number, "label": label, "prediction": prediction, "status": status, "stage": VERIFIER,
            "lower_bound": None, "seconds": answer.seconds, "arithmetic": ARITHMETIC, "reason": reason,
            "spent": {VERIFIER: answer.seconds}, "said": answer.said,
        }  # fmt: skip

    def _fools(self, number: int, image: torch.Tensor, answer: AbcrownAnswer) -> bool:
        """Whether its counterexample, projected onto the ball, replays. It tolerates points that are 1e-4 outside."""
        if answer.counterexample is None:
            return False
        point = self.ball.project(image[None], answer.counterexample.reshape(1, *image.shape))[0]
        specification = Specification.robust(self.split.labels[number : number + 1].cpu(), self.classes)
        return not any(bool(holds(specification, logits)[0]) for logits in torch.split(self.replay(point), 1))
