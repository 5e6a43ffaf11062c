from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import check
from ..step import Step
from .ascent import Ascent


@dataclass(frozen=True)
class EarlyStopped(Ascent):
    """An ascent in which each sample stops soon after it is misclassified: friendly adversarial data (arXiv
    2002.11242).

    A sample stops at the first point with more than ``patience`` misclassified points up to it; with a patience of
    ``steps`` none stops. All samples are passed to the end, so that a sample's path does not depend on the others.

    Args:
        patience: tau, the number of misclassified points that a sample may pass.
        milestones: patience grows by one after each of these numbers of epochs.
    """

    patience: int = 0
    milestones: tuple[int, ...] = (30, 50, 70)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.patience >= 0, "patience", self.patience, "a whole number >= 0")
        check(all(m >= 1 for m in self.milestones), "milestones", self.milestones, "a list of epochs >= 1")

    def taken(self, points: Tensor, moved: Tensor, wrong: Tensor, step: Step) -> Tensor:
        patience = self.patience + sum(step.epoch >= milestone for milestone in self.milestones)
        going = (wrong <= patience).reshape(-1, *[1] * (points.ndim - 1))
        return torch.where(going, moved, points)
