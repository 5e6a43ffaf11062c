from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bounds import Activity, Forward
from ..bounds.crown import best_forms, bound_forms, interval_bounds, interval_ends
from ..bounds.folding import fold
from ..bounds.network import Network
from ..bounds.output_forms import Margins, OutputForms
from ..bounds.region import Region
from ..step import Batch, Step
from .base import Ramp, check_share, value_at
from .certified import CertifiedLoss, margin_loss, margin_rows, mix, verified_parts


@dataclass(frozen=True)
class CrownIbp(CertifiedLoss):
    """CROWN-IBP (Zhang et al., arXiv 1906.06316): one backward pass of linear bounds over interval bounds.

    kappa · CE(clean) + (1 - kappa) · L(beta · m_CROWN-IBP + (1 - beta) · m_IBP), where m are lower bounds of the
    margins and L is their cross-entropy; batch statistics of the clean pass.

    Args:
        beta: weight of the linear bounds, constant or along the ramp; published recipes end in plain intervals.
        fusion: bound the cross-entropy itself by one linear form, instead of one for each wrong class (Xu et al.,
            arXiv 2002.12920), and mix the two losses instead of the margins. Made for many classes.
        best_layer: minimise each linear form over the intervals of every layer that the backward pass visits and keep
            the best minimum, instead of minimising over the input alone (as CTBench does).
    """

    beta: float | Ramp = Ramp(1.0, 0.0, along="epsilon")
    fusion: bool = False
    best_layer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("beta", self.beta)

    def clean_gradient(self, step: Step) -> bool:
        return True  # the bounds use the clean pass' statistics, with their gradients

    def robust(self, model: nn.Module, batch: Batch, step: Step, clean: Forward) -> tuple[Tensor, dict, Activity]:
        verified, activity = self.bound(model, batch, step, clean.statistics)
        share = value_at(self.beta, step)
        if share == 0:
            return margin_loss(verified).mean(), verified_parts(verified), activity
        network, region = fold(model, batch.images.shape[1:], clean.statistics), step.ball.region(batch.images)
        if self.fusion:
            rows = Margins.of_labels(batch.labels, clean.logits.shape[1]).to(clean.logits.dtype)
            fused = fused_loss(network, region, rows, self.best_layer)
            return mix(margin_loss(verified).mean(), fused.mean(), share), verified_parts(verified), activity
        linear = _bounded(network, region, margin_rows(batch.labels, clean.logits), self.best_layer)
        verified = mix(verified, linear, share)
        return margin_loss(verified).mean(), verified_parts(verified), activity


def _bounded(network: Network, region: Region, forms: Tensor, best_layer: bool) -> Tensor:
    if best_layer:
        return best_forms(network, region, forms)
    return bound_forms(network, region, forms, interval_bounds(network, region))


def fused_loss(network: Network, region: Region, rows: Tensor | OutputForms, best_layer: bool = False) -> Tensor:
    """(B,) upper bounds of log(1 + sum_j e^(-z_j)) over the region, z = rows · logits, rows (B, K - 1, K).

    Over the interval [a, b] of a margin, e^(-z) is below its chord e^(-a) - s (z - a). The sum of chords is one linear
    form of the logits, whose minimum one backward pass bounds.
    """
    rows = OutputForms.of(rows)
    lower, upper = interval_ends(network, region, rows)
    width = upper - lower
    # exponentials relative to the largest one, which overflows float32
    largest = (-lower).amax(1, keepdim=True).clamp(min=0).detach()
    at_lower = torch.exp(-lower - largest)
    wide = width > 1e-4  # below it the quotient cancels: the first two terms of its series instead
    share = torch.where(wide, -torch.expm1(-width) / torch.where(wide, width, 1), 1 - width / 2)
    slopes = at_lower * share
    least = _bounded(network, region, rows.weighted(slopes).unsqueeze(1), best_layer).squeeze(1)
    one = torch.exp(-largest.squeeze(1))
    total = one + (at_lower + slopes * lower).sum(1) - least
    return largest.squeeze(1) + total.clamp(min=one).log()
