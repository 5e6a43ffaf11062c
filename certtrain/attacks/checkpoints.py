from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..bounds import NormBall
from ..errors import check
from ..step import Batch, Step
from .ascent import Ascent, Start
from .base import AttackResult


@dataclass(frozen=True)
class Checkpoints(Ascent):
    """One step, shortened to the first misclassified of several points on its way (Kim et al., arXiv 2010.01799).

    The step leads to x + d. The result is the first misclassified one of x + (k / checkpoints) d, k = 1, 2, …, else the
    last; a sample that is misclassified at the point of ``reference`` stays unchanged. The points before the last are
    passed through the network together, without gradient.

    Its trace holds ``share`` (B,) int64 too: the k that was taken, 0 for the image.

    Args:
        checkpoints: c, the number of points; 1 for the step alone.
        reference: where a sample must be classified correctly: at the ``start`` of the step (the authors' own
            code), or at the image itself (``clean``, one pass more; the code of arXiv 2601.13645).
    """

    steps: int = 1
    step_size: float = 1.25
    start: Start = "uniform"
    checkpoints: int = 3
    reference: Literal["start", "clean"] = "start"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.steps == 1, "steps", self.steps, "1")
        check(self.checkpoints >= 1, "checkpoints", self.checkpoints, "a whole number >= 1")
        check(self.reference in ("start", "clean"), "reference", self.reference, "start, clean")

    def propose(self, model: nn.Module, batch: Batch, ball: NormBall, step: Step) -> AttackResult:
        found = super().propose(model, batch, ball, step)
        images, count = batch.images, self.checkpoints
        points = [self.bounded(images, torch.lerp(images, found.images, k / count), ball) for k in range(1, count)]
        points = torch.stack([images, *points, found.images])
        right = torch.ones(count + 1, len(batch), dtype=torch.bool, device=images.device)
        right[0] = found.trace["correct"] > 0 if self.reference == "start" else _right(model, images, batch.labels)
        if count > 1:
            between = points[1:-1].flatten(0, 1)
            right[1:-1] = _right(model, between, batch.labels.repeat(count - 1)).reshape(count - 1, -1)
        right[-1] = False  # the last is taken whatever it is
        share = torch.where(right[0], right[1:].int().argmin(0) + 1, 0)
        taken = points[share, torch.arange(len(batch), device=images.device)]
        return AttackResult(taken, {**found.trace, "share": share})


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(images).argmax(1) == labels
