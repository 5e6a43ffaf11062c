# Triton bodies: their pointers have no types, and an annotation would change what is compiled.
# pyright: basic
"""Margins by sums over d of |w_y - w_j| r, in tiles of (images, classes) or (images, features).

Rows are read transposed, so that each step of the loop is an outer product of vectors contiguous in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ACCUMULATORS, accumulator, launch, wide


@triton.jit
def _forward(
    center, radius, weight, bias, labels, out, images, classes, features,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``center``, ``radius`` (D, B) and ``weight`` (D, K) are transposed."""
    columns = tl.cdiv(classes, BLOCK_K)
    image = tl.program_id(0) // columns * BLOCK_I + tl.arange(0, BLOCK_I)
    other = tl.program_id(0) % columns * BLOCK_K + tl.arange(0, BLOCK_K)
    label = tl.load(labels + image, image < images, 0)
    total = tl.zeros([BLOCK_I, BLOCK_K], ACC)
    for _ in range(features):
        own = wide(tl.load(weight + label, image < images, 0.0))
        difference = own[:, None] - wide(tl.load(weight + other, other < classes, 0.0))[None, :]
        c = wide(tl.load(center + image, image < images, 0.0))
        r = wide(tl.load(radius + image, image < images, 0.0))
        total += difference * c[:, None] - tl.abs(difference) * r[:, None]
        weight, center, radius = weight + classes, center + images, radius + images
    if bias is not None:
        own = wide(tl.load(bias + label, image < images, 0.0))
        total += own[:, None] - wide(tl.load(bias + other, other < classes, 0.0))[None, :]
    column = other[None, :] - (other[None, :] > label[:, None]).to(tl.int32)
    keep = (image < images)[:, None] & (other < classes)[None, :] & (other[None, :] != label[:, None])
    tl.store(out + image.to(tl.int64)[:, None] * (classes - 1) + column, total, keep)


@triton.jit
def _to_radius(
    grad, weight, labels, for_radius, signs, images, classes, features,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``grad`` is (K, B) with 0 at each image's label. ``signs`` receives the sum over j of grad sign(w_y - w_j):
    w_y's gradient divided by -radius."""
    columns = tl.cdiv(features, BLOCK_D)
    image = tl.program_id(0) // columns * BLOCK_I + tl.arange(0, BLOCK_I)
    feature = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    label = tl.load(labels + image, image < images, 0)
    inside = (image < images)[:, None] & (feature < features)[None, :]
    own = wide(tl.load(weight + label[:, None] * features + feature[None, :], inside, 0.0))
    onto, due = tl.zeros([BLOCK_I, BLOCK_D], ACC), tl.zeros([BLOCK_I, BLOCK_D], ACC)
    rivals = weight
    for j in range(classes):
        g = tl.load(grad + image, image < images, 0.0)[:, None]
        rival = wide(tl.load(rivals + feature, feature < features, 0.0))[None, :]
        difference = tl.where(label[:, None] == j, 0.0, own - rival)  # inf - inf would be NaN
        onto -= g * tl.abs(difference)
        due += tl.where(difference > 0, g, tl.where(difference < 0, -g, g * 0.0))
        grad, rivals = grad + images, rivals + features
    at = image.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(for_radius + at, onto, inside)
    tl.store(signs + at, due, inside)


@triton.jit
def _to_weight(
    grad, radius, weight, labels, signs, for_weight, images, classes, features,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``grad`` is (B, K) with 0 at each image's label."""
    columns = tl.cdiv(features, BLOCK_D)
    rival = tl.program_id(0) // columns * BLOCK_K + tl.arange(0, BLOCK_K)
    feature = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rival < classes)[:, None] & (feature < features)[None, :]
    at = rival.to(tl.int64)[:, None] * features + feature[None, :]
    rows = wide(tl.load(weight + at, inside, 0.0))
    onto = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    for image in range(images):
        label = tl.load(labels + image)
        g = tl.load(grad + rival, rival < classes, 0.0)[:, None]
        r = wide(tl.load(radius + feature, feature < features, 0.0))[None, :]
        due = tl.load(signs + feature, feature < features, 0.0)[None, :]
        own = wide(tl.load(weight + label * features + feature, feature < features, 0.0))[None, :]
        step, difference = g * r, own - rows
        moved = tl.where(difference > 0, step, tl.where(difference < 0, -step, step * 0.0))
        onto += tl.where((rival == label)[:, None], -due * r, moved)
        grad, radius, signs = grad + classes, radius + features, signs + features
    tl.store(for_weight + at, onto, inside)


def margins(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    images, features, classes = *center.shape, len(weight)
    out = center.new_empty(images, max(classes - 1, 0))
    block_i, block_k = 16, 64
    launch(
        _forward, triton.cdiv(images, block_i) * triton.cdiv(classes, block_k), center,
        *(t.t().contiguous() for t in (center, radius, weight)), None if bias is None else bias.contiguous(), labels,
        out, images, classes, features, BLOCK_I=block_i, BLOCK_K=block_k, ACC=ACCUMULATORS[accumulator(center.dtype)],
        fused=True,
    )  # fmt: skip
    return out


def margins_backward(grad: Tensor, radius: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    images, features, classes = *radius.shape, len(weight)
    acc = accumulator(radius.dtype)
    for_radius, for_weight = torch.empty_like(radius), torch.empty_like(weight)
    signs = torch.empty_like(radius, dtype=acc)
    full = _with_labels(grad.to(acc), labels, classes)
    block, block_d = 16, 64
    numbers, columns = (images, classes, features), triton.cdiv(features, block_d)
    constants = {"BLOCK_D": block_d, "ACC": ACCUMULATORS[acc], "fused": True}
    launch(
        _to_radius, triton.cdiv(images, block) * columns, radius, full.t().contiguous(), weight, labels, for_radius,
        signs, *numbers, BLOCK_I=block, **constants,
    )  # fmt: skip
    launch(
        _to_weight, triton.cdiv(classes, block) * columns, radius, full, radius, weight, labels, signs, for_weight,
        *numbers, BLOCK_K=block, **constants,
    )  # fmt: skip
    return for_radius, for_weight


def _with_labels(grad: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(B, K): the gradient at each rival class, 0 at the label."""
    others = torch.arange(classes - 1, device=labels.device)
    return grad.new_zeros(len(grad), classes).scatter_(1, others + (others >= labels[:, None]), grad)
