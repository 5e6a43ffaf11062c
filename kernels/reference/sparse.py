"""Top-k selection and one sPGD update (Zhong et al., arXiv 2405.05075), with a fixed order of entries.

Order: value descending, every NaN equal and greatest, -0 equal to +0, ties to the lowest index. A stable
descending sort has this order; ``torch.topk`` guarantees none for ties.
"""

import math

import torch
from torch import Tensor

NORM_FLOOR = 2e-10
"""Mask gradients with a smaller l2 norm leave the logits as they are, as in the authors' code."""


def topk_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    order = torch.sort(scores.flatten(1), dim=1, descending=True, stable=True).indices
    rank = torch.arange(order.shape[1], device=order.device)
    selected = rank < (k[:, None] if isinstance(k, Tensor) else k)
    mask = torch.zeros_like(order, dtype=torch.uint8)
    return mask.scatter_(1, order, selected.expand(order.shape).to(torch.uint8)).reshape(scores.shape)


def sparse_apply(x: Tensor, p: Tensor, scores: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    mask = topk_mask(scores, k)
    chosen = mask.reshape(len(x), 1, *x.shape[2:]).bool()
    return torch.where(chosen, (x + p).clamp(0, 1), x), mask


def spgd_step(
    gradient: Tensor, p: Tensor, m: Tensor, x: Tensor, mask: Tensor, k: int | Tensor,
    *, alpha: float, beta: float, projected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape, rows = x.shape, len(x)
    gradient, p, x = (t.flatten(2) for t in (gradient, p, x))
    logits, old = m.reshape(rows, x.shape[2]), mask.reshape(rows, x.shape[2])
    pixels = logits.shape[1]

    sigmoid = torch.sigmoid(logits)
    for_mask = (gradient * p).sum(1) * sigmoid * (1 - sigmoid)
    norm = for_mask.square().sum(1, keepdim=True).sqrt()
    moved = logits + beta * math.sqrt(pixels) / (norm + 1e-10) * for_mask
    logits = torch.where(norm.isfinite() & (norm >= NORM_FLOOR), moved, logits)

    ascent = gradient * old[:, None] if projected else gradient
    step = alpha * ((ascent > 0).to(p.dtype) - (ascent < 0).to(p.dtype))  # NaN takes no step
    p = torch.minimum(torch.maximum((p + step).clamp(-1, 1), -x), 1 - x)

    x_adv, new = sparse_apply(x, p, logits, k)
    changed = (new != old).any(1)
    return p.reshape(shape), logits.reshape(m.shape), new.reshape(mask.shape), x_adv.reshape(shape), changed
