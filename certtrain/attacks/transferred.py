"""Perturbations stored for each sample across epochs, in the frame before crop and flip: the attack of ATTA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bounds import NormBall
from ..config import added
from ..errors import check
from ..step import Augmentation, Batch, StateSpec, Step
from .ascent import Ascent, Start
from .base import AttackResult
from .objective import CrossEntropy, Objective, nonzero_start

KEPT = "transferred"


@dataclass(frozen=True)
class Transferred(Ascent):
    """Ascent that starts where the sample's last visit ended (Zheng et al., arXiv 1912.11969).

    The perturbation is stored in the frame of the padded image: each visit reads the window of its crop and flip, and
    writes it back after the last step; pixels outside the window are unchanged. In every ``reset``-th epoch, and in
    the first one, all of it is ``start_scale`` · normal noise. A visit at epsilon 0, where a ramp begins, stores 0: the
    next one starts at the image, or at such noise if the objective is a divergence, which is flat there. Without
    declared state, in an evaluation, every visit is a first one.

    ATTA-1 is one step of 0.015 in a radius of 0.031, the default; ATTA-3 three of 0.01, ATTA-10 ten of 0.007.

    Args:
        reset: epochs between two fresh starts.
        early: how many epochs before each multiple of ``reset`` the fresh start comes: 1 in the authors' code, which
            counts epochs from 1 and begins anew with the 10th, 20th and 30th.
        objective: the cross-entropy, as released, even where the loss is TRADES; null for the loss' own.
    """

    steps: int = 1
    step_size: float = 15 / 31
    start: Start = "normal"
    start_scale: float = 1e-3
    reset: int = 10
    objective: Objective | None = CrossEntropy()
    early: int = added(0)

    def __post_init__(self) -> None:
        check(self.start == "normal", "start", self.start, "normal; start_scale 0 for the image itself")
        check(self.projected, "projected", self.projected, "true: a perturbation that is kept would grow")
        check(self.reset >= 1, "reset", self.reset, "a number of epochs >= 1")
        check(0 <= self.early < self.reset, "early", self.early, f"a number of epochs from 0 to {self.reset - 1}")
        super().__post_init__()

    def declare_state(self, shape: tuple[int, ...], classes: int) -> Mapping[str, StateSpec]:
        return {KEPT: StateSpec("sample", shape, padded=True)}

    def begin(self, batch: Batch, ball: NormBall, step: Step) -> Tensor:
        if KEPT not in step.state.tensors:
            return super().begin(batch, ball, step)
        images = batch.images
        kept = step.state.read(KEPT, batch).to(images.dtype)

        def fresh(shape: tuple[int, ...]) -> Tensor:
            return self.start_scale * step.noise.normal(shape, "start", images.dtype)

        if step.epoch == 0 or (step.epoch + self.early) % self.reset == 0:
            kept = fresh(kept.shape[1:])
            step.state.write(KEPT, batch, kept)
        change = window(kept, batch)
        if self.objective is not None:
            change = nonzero_start(self.objective, change, lambda: fresh(images.shape[1:]))
        return self.bounded(images, images + change, ball)

    def propose(self, model: nn.Module, batch: Batch, ball: NormBall, step: Step) -> AttackResult:
        found = super().propose(model, batch, ball, step)
        if KEPT in step.state.tensors:
            change = (found.images - batch.images).nan_to_num(0, 0, 0)
            step.state.write(KEPT, batch, with_window(step.state.read(KEPT, batch), batch, change))
        return found


def window(padded: Tensor, batch: Batch) -> Tensor:
    """The window (B, C, H, W) of the batch's crop and flip in ``padded`` (B, C, H + 2 pad, W + 2 pad)."""
    return padded.permute(0, 2, 3, 1)[_pixels(padded, batch)].permute(0, 3, 1, 2)


def with_window(padded: Tensor, batch: Batch, change: Tensor) -> Tensor:
    """A copy of ``padded`` with ``change`` (B, C, H, W) in the window of the batch's crop and flip."""
    written = padded.permute(0, 2, 3, 1).clone()
    written[_pixels(padded, batch)] = change.permute(0, 2, 3, 1).to(padded.dtype)
    return written.permute(0, 3, 1, 2)


def _pixels(padded: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, row and column in the frame of each pixel of the batch's images; the middle without augmentation."""
    height, width = batch.images.shape[2:]
    sample = torch.arange(len(batch), device=padded.device)
    drawn = batch.augmentation
    if drawn is None:
        top, left = ((side - shown) // 2 for side, shown in zip(padded.shape[2:], (height, width), strict=True))
        drawn = Augmentation(torch.full_like(sample, top), torch.full_like(sample, left), sample < 0)
    rows, columns = drawn.rows_and_columns(height, width)
    return sample[:, None, None], rows[:, :, None], columns[:, None, :]
