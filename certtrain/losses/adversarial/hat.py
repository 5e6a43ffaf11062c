from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attacks import AttackResult
from ...errors import check
from ...step import Batch, Step
from ..base import Ramp, check_least, value_at
from ..teacher import fingerprint, load_teacher
from .base import Passes
from .trades import Trades


@dataclass(frozen=True)
class Hat(Trades):
    """HAT: TRADES plus helper examples beyond the adversarial ones, labelled by a normally trained network (Rade and
    Moosavi-Dezfooli, ICLR 2022, "Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off").

    TRADES + helper_weight · mean CE(f(x + extrapolation · (x' - x)), argmax f_std(x')). The helper examples are clipped
    neither to the ball nor to valid images. Three passes: clean, adversarial and helper images.

    Args:
        teacher: f_std, frozen and in evaluation mode: a run's folder, or a ``.safetensors`` file, with weights of the
            same architecture.
        helper_weight: gamma.
        extrapolation: h.
    """

    weight: float | Ramp = 2.5
    teacher: Path | None = None
    helper_weight: float | Ramp = 0.5
    extrapolation: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("helper_weight", self.helper_weight)
        check(self.extrapolation >= 0, "extrapolation", self.extrapolation, "a number >= 0")

    def files(self) -> Mapping[str, str]:
        return fingerprint(self.teacher)

    def check_model(self, model: nn.Module) -> None:
        load_teacher(model, self.teacher)

    def attacked(self, model: nn.Module, batch: Batch, step: Step) -> AttackResult:
        found = super().attacked(model, batch, step)
        with torch.no_grad():
            taught = load_teacher(model, self.teacher)(found.images)
        return replace(found, trace={**found.trace, "taught": taught})

    def passes(self, model: nn.Module, batch: Batch, step: Step, found: AttackResult, clean: Tensor | None) -> Passes:
        passes = super().passes(model, batch, step, found, clean)
        helper = model(batch.images + self.extrapolation * (found.images - batch.images))
        return replace(passes, others={"helper": helper, "taught": found.trace["taught"]})

    def regularisers(self, passes: Passes, step: Step) -> Mapping[str, Tensor]:
        helper = F.cross_entropy(passes.others["helper"], passes.others["taught"].argmax(1))
        return {**super().regularisers(passes, step), "helper": value_at(self.helper_weight, step) * helper}
