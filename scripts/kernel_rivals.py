"""The forms in which others compute the kernels' results today, reimplemented for comparison in time."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _signs(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.clamp(min=0), values.clamp(max=0)


def four_linear(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None, *, scale=None, shift=None, relu=False
):
    plus, minus = _signs(weight)
    ends = F.linear(lower, plus, bias) + F.linear(upper, minus), F.linear(upper, plus, bias) + F.linear(lower, minus)
    return _four_affine(ends, scale, shift, relu)


def four_conv2d(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int,
    *, scale=None, shift=None, relu=False,
):  # fmt: skip
    plus, minus = _signs(weight)

    def conv(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.conv2d(x, w, b, stride, padding)

    ends = conv(lower, plus, bias) + conv(upper, minus), conv(upper, plus, bias) + conv(lower, minus)
    return _four_affine(ends, scale, shift, relu)


def _four_affine(ends: tuple[Tensor, Tensor], scale: Tensor | None, shift: Tensor | None, relu: bool):
    lower, upper = ends
    if scale is not None and shift is not None:
        plus, minus = _signs(scale.reshape(-1, *[1] * (lower.ndim - 2)))
        shift = shift.reshape(plus.shape)
        lower, upper = lower * plus + upper * minus + shift, upper * plus + lower * minus + shift
    return (lower.relu(), upper.relu()) if relu else (lower, upper)


def bmm_margins(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Margins by a specification matrix for each image, merged into the last layer."""
    classes = len(weight)
    identity = torch.eye(classes, dtype=weight.dtype, device=weight.device)
    rows = identity[labels].unsqueeze(1) - identity.unsqueeze(0)
    rows = rows[~F.one_hot(labels, classes).bool()].reshape(len(labels), classes - 1, classes)
    merged = rows @ weight
    lower = torch.bmm(merged, center.unsqueeze(-1)) - torch.bmm(merged.abs(), radius.unsqueeze(-1))
    return lower.squeeze(-1) + rows @ bias


FOUR = SimpleNamespace(
    ibp_linear=four_linear, ibp_conv2d=four_conv2d,
    ibp_margins=lambda low, up, *rest: bmm_margins((up + low) / 2, (up - low) / 2, *rest),
)  # fmt: skip


def topk_scatter(scores: Tensor, k: int) -> Tensor:
    index = torch.topk(scores, k, dim=1, sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device).scatter_(1, index, 1)


def sort_scatter(scores: Tensor, k: int) -> Tensor:
    """Select by clone, full sort, zero and scatter, as in the attack's released code."""
    index = torch.sort(scores.clone(), dim=1, descending=True).indices[:, :k]
    return torch.zeros_like(scores).scatter_(1, index, torch.ones_like(index, dtype=scores.dtype))


def closed_step(gradient, p, m, x, mask, k, alpha, beta):
    """The update in closed form with ``torch.topk``, suited to compilation."""
    s = torch.sigmoid(m)
    for_mask = (gradient * p).sum(1) * s * (1 - s)
    norm = for_mask.norm(dim=1, keepdim=True)
    m = torch.where(norm < 2e-10, m, m + beta * math.sqrt(m.shape[1]) * for_mask / (norm + 1e-10))
    p = torch.minimum(torch.maximum((p + alpha * (gradient * mask[:, None]).sign()).clamp(-1, 1), -x), 1 - x)
    new = topk_scatter(m, k)
    return p, m, new, (x + p * new[:, None]).clamp(0, 1), (new != mask).any(1)


def released_step(gradient, p, m, x, mask, k, alpha, beta):
    """One update in the released form, with full sorts and asserts that wait for the device."""
    s = torch.sigmoid(m)
    old = sort_scatter(s, k)
    for_p = gradient * old.unsqueeze(1)
    for_mask = (gradient * p).sum(1) * s * (1 - s)
    p = (p + alpha * for_p.sign()).clamp(-1, 1)
    p = torch.min(torch.max(p, -x), 1 - x)
    norm = torch.norm(for_mask, p=2, dim=1, keepdim=True)
    m = torch.where(norm < 2e-10, m, m + beta * math.sqrt(m.shape[1]) * for_mask / (norm + 1e-10))
    assert not torch.isnan(m).any() and not torch.isnan(p).any()
    new = sort_scatter(torch.sigmoid(m), k)
    images = x + p * new.unsqueeze(1)
    assert bool((images >= -1e-6).all()) and bool(((images - x).abs().sum(1) > 0).sum(1).max() <= k)
    return p, m, new, images, (new - old).abs().sum(1) > 0


def clamped_crown(a: Tensor, bias: Tensor, low: Tensor, up: Tensor, intercept: Tensor):
    """CROWN's step with positive and negative parts separate, as in other verifiers."""
    plus, minus = a.clamp(min=0), a.clamp(max=0)
    return plus * low[:, None] + minus * up[:, None], bias + (minus @ intercept[:, :, None]).squeeze(-1)


def sorted_breakpoints(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """The exact minima over cut boxes, where the sorted breakpoints of the dual turn its slope (arXiv 2512.11087)."""
    found = []
    for cut, offset, own in zip(cuts, offsets, rows, strict=True):
        form = forms[own]
        falls = form * cut < 0
        t, order = torch.where(falls, -form / cut, 0).sort(dim=1)
        rises = torch.where(falls, -cut.abs(), cut.abs()).sum(1, keepdim=True)
        slopes = offset - rises - torch.where(falls, 2 * cut.abs(), 0).gather(1, order).cumsum(1)
        best = t.gather(1, (slopes > 0).sum(1, keepdim=True).clamp(max=t.shape[1] - 1))
        dual = best.squeeze(1) * offset - (form + best * cut).abs().sum(1)
        found.append(constants[own] + torch.maximum(dual, -form.abs().sum(1)))
    return torch.stack(found)


def auto_lirpa(model: nn.Module, images: Tensor, lower: Tensor, upper: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # type: ignore[import-not-found]

    bounded = BoundedModule(model, torch.empty_like(images), device=images.device)
    for node in bounded.nodes():  # training mode lets gradients through; batch norms stay fixed
        node.train("BatchNorm" not in type(node).__name__)
    identity = torch.eye(10, dtype=images.dtype, device=images.device)
    rows = (identity[labels].unsqueeze(1) - identity)[~F.one_hot(labels, 10).bool()].reshape(len(images), 9, 10)

    def forward() -> Tensor:
        box = BoundedTensor(images, PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper))
        return bounded.compute_bounds(x=(box,), C=rows, method="IBP", bound_upper=False)[0]

    return forward
