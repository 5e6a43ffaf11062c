"""Magnitudes and logits stored for each sample across epochs: the attack of ATTA on few pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ...bounds import SparseBall
from ...errors import check
from ...step import Batch, StateSpec, Step
from ..transferred import window, with_window
from .spgd import SparsePgd, Walk

MAGNITUDES = "transferred_magnitudes"
LOGITS = "transferred_logits"


@dataclass(frozen=True)
class SparseTransferred(SparsePgd):
    """sPGD that starts with the magnitudes and logits that the sample's last visit ended with: ATTA for l0.

    Both lie in the frame of the padded image, and move with crop and flip as the perturbation of ``Transferred`` does
    (Zheng et al., arXiv 1912.11969); logits as one channel more. In every ``reset``-th epoch, the first one included,
    all of it is drawn anew, as sPGD's start is. Without declared state, in an evaluation, every visit is a first one.
    The transfer is ours: the source names ATTA over its l0 attack without details (Zhong et al., NeurIPS 2025).

    A pixel stores the largest logit of its units, and a unit starts from the largest of its pixels: exact for pixels,
    approximate for patches that a crop has moved, and for features, of which a pixel has several.

    Args:
        reset: epochs between two fresh starts.
        keep: ``last``: where the next visit starts.
    """

    steps: int = 1
    alpha: float = 1.0
    beta: float = 1.0
    patience: int | None = None
    keep: Literal["best", "last"] = "last"
    reset: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.keep == "last", "keep", self.keep, "last: the next visit starts there")
        check(self.reset >= 1, "reset", self.reset, "a number of epochs >= 1")

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return {
            MAGNITUDES: StateSpec("sample", shape, padded=True),
            LOGITS: StateSpec("sample", (1, *shape[1:]), padded=True),
        }

    def begin(self, batch: Batch, ball: SparseBall, step: Step) -> Walk:
        if MAGNITUDES not in step.state.tensors:
            return super().begin(batch, ball, step)
        images = batch.images
        p, m = (step.state.read(name, batch).to(images.dtype) for name in (MAGNITUDES, LOGITS))
        if step.epoch % self.reset == 0:
            p = 2 * step.noise.uniform(p.shape[1:], "magnitudes", images.dtype) - 1
            m = step.noise.normal(m.shape[1:], "logits", images.dtype)
            step.state.write(MAGNITUDES, batch, p)  # what lies outside of the window stays until the next reset
            step.state.write(LOGITS, batch, m)
        center, p = ball.grouped(images), ball.grouped(window(p, batch))
        p = torch.minimum(torch.maximum(p, -center), 1 - center)
        m = ball.grouped(window(m, batch).expand_as(images)).amax(1)
        return Walk.starting(center, p, m, ball.counts(images), step.noise)

    def ended(self, walk: Walk, batch: Batch, step: Step) -> None:
        if MAGNITUDES not in step.state.tensors:
            return
        ball, shape = SparseBall.of(step.ball), batch.images.shape[1:]
        p = ball.ungrouped(walk.p, shape)
        m = ball.ungrouped(walk.m.unsqueeze(1).expand_as(walk.p), shape).amax(1, keepdim=True)
        for name, change in ((MAGNITUDES, p), (LOGITS, m)):
            step.state.write(name, batch, with_window(step.state.read(name, batch), batch, change))
