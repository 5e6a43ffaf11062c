from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bounds import Activity, Forward, Network, compute_activity, compute_margins, forward, split
from ..errors import check
from ..step import Batch, Step
from .base import value_at
from .cc_ibp import CcIbp
from .certified import attacked_parts, margins_of, mix, verified_parts
from .teacher import fingerprint, load_teacher


@dataclass(frozen=True)
class CcDist(CcIbp):
    """CC-Dist: CC-IBP plus the distance to an empirically robust teacher's features (De Palma, arXiv 2602.02626).

    CC-IBP + (weight / d) · mean over the batch of max over the two ends of |(1 - alpha) h(x_adv) + alpha h_end -
    h_teacher(x)|², where h are the d features that the last linear layer reads, and h_end the lower and the upper ends
    of their interval bounds. Written from a second-hand description; not compared with the paper's text.

    Args:
        teacher: a run's folder, or a ``.safetensors`` file, with weights of the same architecture. Only weights are
            read: activations and strides are the student's own.
        weight: multiplies the distance.
    """

    teacher: Path | None = None
    weight: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.weight >= 0, "weight", self.weight, "a number >= 0")
        check(
            self.adversarial is None, "adversarial", type(self.adversarial).__name__, "null: only attack is known here"
        )

    def files(self) -> Mapping[str, str]:
        return fingerprint(self.teacher)

    def check_model(self, model: nn.Module) -> None:
        split(model, 0)
        self._target(model)

    def robust(self, model: nn.Module, batch: Batch, step: Step, clean: Forward) -> tuple[Tensor, dict, Activity]:
        halves, alpha = split(model, 0), value_at(self.alpha, step)
        first, second = halves.share(clean.statistics) if self.bn_mode == "clean" else (None, None)
        features = forward(halves.extractor, self.attacked(model, batch, step), first)
        logits = forward(halves.classifier, features.logits, second)
        box, activity = compute_activity(halves.extractor, step.ball.region(batch.images), features.statistics)
        verified, _ = compute_margins(halves.classifier, box, batch.labels, logits.statistics)
        margins = margins_of(logits.logits, batch.labels)
        with torch.no_grad():
            target = forward(self._target(model), batch.images).logits
        ends = [mix(features.logits, end, alpha) for end in (box.lower, box.upper)]
        distance = torch.stack([(end - target).square().flatten(1).mean(1) for end in ends]).amax(0).mean()
        parts = attacked_parts(margins) | verified_parts(verified) | {"distance": distance}
        return self.combine(margins, verified, alpha) + self.weight * distance, parts, activity

    def _target(self, model: nn.Module) -> Network:
        """The teacher's feature extractor."""
        return split(load_teacher(model, self.teacher), 0).extractor
