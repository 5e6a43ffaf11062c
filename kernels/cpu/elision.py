"""Margins by sums over d of |w_y - w_j| r, with two weight rows and one image's row in cache."""

import numpy as np
import torch
from torch import Tensor

from .threads import Array, array, jit, run

TILE = 16
"""Classes kept in cache while a thread goes over its images: 16 × 512 float32 are 32 KiB."""


@jit(reassociate=True)
def _forward(
    first: int, last: int, center: Array, radius: Array, weight: Array, bias: Array, labels: Array, out: Array,
    zero: float,
) -> None:  # fmt: skip
    """Items are images."""
    classes, tile = weight.shape[0], 16
    for start in range(0, classes, tile):
        for image in range(first, last):
            label = labels[image]
            own, c, r = weight[label], center[image], radius[image]
            for j in range(start, min(start + tile, classes)):
                if j != label:
                    other, total = weight[j], zero
                    for d in range(own.shape[0]):
                        difference = own[d] - other[d]
                        total += difference * c[d] - abs(difference) * r[d]
                    out[image, j - (j > label)] = total + (bias[label] - bias[j])


@jit
def _to_radius(
    first: int, last: int, grad: Array, weight: Array, labels: Array, for_radius: Array, signs: Array
) -> None:
    """Items are images. ``signs`` receives the sum over j of grad sign(w_y - w_j): w_y's gradient over -radius."""
    for image in range(first, last):
        label = labels[image]
        own, to, onto = weight[label], for_radius[image], signs[image]
        for j in range(weight.shape[0]):
            if j != label:
                other, g = weight[j], grad[image, j - (j > label)]
                for d in range(own.shape[0]):
                    difference = own[d] - other[d]
                    to[d] -= g * abs(difference)
                    onto[d] += g if difference > 0 else -g if difference < 0 else g * 0


@jit
def _to_weight(
    first: int, last: int, grad: Array, radius: Array, weight: Array, labels: Array, signs: Array, for_weight: Array
) -> None:
    """Items are classes, each as the rival j of other labels and as the label y of its own images."""
    for image in range(labels.shape[0]):
        label = labels[image]
        own, r = weight[label], radius[image]
        if first <= label < last:
            to, onto = for_weight[label], signs[image]
            for d in range(r.shape[0]):
                to[d] -= onto[d] * r[d]
        for j in range(first, last):
            if j != label:
                other, to, g = weight[j], for_weight[j], grad[image, j - (j > label)]
                for d in range(r.shape[0]):
                    difference, step = own[d] - other[d], g * r[d]
                    to[d] += step if difference > 0 else -step if difference < 0 else step * 0


def margins(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    out = center.new_empty(len(center), max(len(weight) - 1, 0))
    constant = center.new_zeros(len(weight)) if bias is None else bias.detach().contiguous()
    zero = np.float32(0) if center.dtype == torch.float32 else np.float64(0)
    arrays = [array(t, *t.shape) for t in (center, radius, weight, constant, labels, out)]
    run(_forward, len(center), out.numel() * center.shape[1], *arrays, zero)
    return out


def margins_backward(grad: Tensor, radius: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    for_radius, signs, for_weight = torch.zeros_like(radius), torch.zeros_like(radius), torch.zeros_like(weight)
    work = grad.numel() * radius.shape[1]
    g, r, w, y, to_r, s, to_w = (
        array(t, *t.shape) for t in (grad, radius, weight, labels, for_radius, signs, for_weight)
    )
    run(_to_radius, len(radius), work, g, w, y, to_r, s)
    run(_to_weight, len(weight), work, g, r, w, y, s, to_w)
    return for_radius, for_weight
