"""One score of two classes as two logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import InputError, check


class BinaryScore(nn.Module):
    """The logits (0, s - threshold) of a network's one score s: class 1 wins where s > threshold, class 0 where s <
    threshold. Labels are 0 and 1; a score at the threshold itself is a tie, which is wrong for both.

    It is exact wherever a classifier is accepted: the margin of class 1 is s - threshold, that of class 0 its negative,
    and the cross-entropy of these logits is the binary cross-entropy of s - threshold.

    Args:
        model: maps (B, *shape) to scores (B, 1). All weights are the model's; the two constants are buffers.
        threshold: in the score's units, rounded to the model's dtype: 0 for a logit, 0.5 for a network that ends in a
            sigmoid (for certification; train on the logit).
    Raises:
        InputError: the threshold is not finite; in a call, the model's output is not (B, 1).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, threshold: float = 0.0):
        super().__init__()
        like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
        finite = math.isfinite(threshold) and bool(torch.tensor(threshold, dtype=like.dtype).isfinite())
        check(finite, "threshold", threshold, "a finite number, in the model's dtype")
        self.model = model
        self.register_buffer("scale", like.new_tensor([0.0, 1.0]))
        self.register_buffer("shift", like.new_tensor([0.0, -threshold]))

    def forward(self, x: Tensor) -> Tensor:
        score = self.model(x)
        _check_score(score)
        return score * self.scale + self.shift


def _check_score(score: Any) -> None:
    if isinstance(score, fx.Proxy) or (isinstance(score, Tensor) and score.ndim == 2 and score.shape[1] == 1):
        return  # a traced score has no shape
    found = f"of shape {tuple(score.shape)}" if isinstance(score, Tensor) else f"a {type(score).__name__}"
    raise InputError(f"BinaryScore: found an output {found}; accepted: (B, 1), one score for each image")
