"""A score of two classes as two logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from ..errors import InputError, check


class BinaryScore(nn.Module):
    """The logits (0, s - threshold) of a network's one score s: class 1 wins where s > threshold, class 0 where s <
    threshold. Labels are 0 and 1; a score at the threshold itself is a tie, which is wrong for both.

    Everything that takes a classifier takes it, exactly: the margin of class 1 is s - threshold, that of class 0 its
    negative. The cross-entropy of these logits is the binary cross-entropy of s - threshold.

    Args:
        model: maps (B, *shape) to scores (B, 1). Its weights are the only ones: the two constants are buffers.
        threshold: in the score's units, rounded to the model's dtype: 0 for a logit, 0.5 for a network that ends in a
            sigmoid (to be certified; train on the logit).
    Raises:
        InputError: a threshold that is not finite; when it is called, an output of another shape than (B, 1).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, threshold: float = 0.0):
        super().__init__()
        check(math.isfinite(threshold), "threshold", threshold, "a finite number")
        self.model = model
        like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
        self.register_buffer("scale", like.new_tensor([0.0, 1.0]))
        self.register_buffer("shift", like.new_tensor([0.0, -threshold]))

    def forward(self, x: Tensor) -> Tensor:
        score = self.model(x)
        traced = isinstance(score, fx.Proxy)  # which has no shape yet
        if not traced and not (isinstance(score, Tensor) and score.ndim == 2 and score.shape[1] == 1):
            found = f"of shape {tuple(score.shape)}" if isinstance(score, Tensor) else f"a {type(score).__name__}"
            raise InputError(f"BinaryScore: found an output {found}; accepted: (B, 1), one score for each image")
        return score * self.scale + self.shift
