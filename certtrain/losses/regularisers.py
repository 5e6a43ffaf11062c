"""Terms added to a loss: the l1 norm, and the warm-up regularisers of Shi et al. (arXiv 2103.17268)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bounds import Activity, Interval

TOLERANCE = 0.5


def l1_norm(model: nn.Module) -> Tensor:
    """Sum of |W| over the weights of all linear and convolutional layers; no biases, no batch norm."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    return torch.stack([layer.weight.abs().sum() for layer in layers]).sum() if layers else torch.zeros(())


def warmup_regularisers(activity: Activity) -> tuple[Tensor, Tensor]:
    """(L_tight, L_relu) of Shi et al.: keep box widths and the balance of active ReLUs in check.

    Each is a mean over the network's ReLUs; 0 <= L_tight <= 1 and 0 <= L_relu <= 2. A ReLU whose L_relu is
    not finite (no unit is off on the whole box) counts as 0, as published.
    """
    if activity.first is None or not activity.preactivations:
        zero = torch.zeros(())
        return zero, zero
    width = activity.first.radius.mean()
    layers = list(activity.preactivations.values())
    tight = torch.stack([_hinge(width / layer.radius.mean().clamp(min=1e-12)) for layer in layers])
    balance = torch.stack([_balance(layer) for layer in layers])
    return tight.mean(), balance.mean()


def _hinge(ratio: Tensor) -> Tensor:
    return (TOLERANCE - ratio).clamp(min=0) / TOLERANCE


def _balance(layer: Interval) -> Tensor:
    center = layer.center
    active, dead = layer.lower.detach() > 0, layer.upper.detach() < 0
    squares = (center - center.mean()).square()
    pairs = [((center * active).mean(), -(center * dead).mean()), ((squares * active).sum(), (squares * dead).sum())]
    finite = torch.stack([below > 0 for _, below in pairs]).all()
    # safe denominators first: masking an infinite quotient afterwards still gives a NaN gradient
    ratios = [above / torch.where(below > 0, below, 1) for above, below in pairs]
    return torch.where(finite, torch.stack([_hinge(_symmetric(ratio)) for ratio in ratios]).sum(), 0)


def _symmetric(ratio: Tensor) -> Tensor:
    return torch.minimum(ratio, 1 / ratio.clamp(min=1e-12))
