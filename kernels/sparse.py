"""Top-k pixels: selection in a fixed order, application to images, and one fused sPGD update.

Order of entries, on every backend: value descending, every NaN equal and greatest, -0 equal to +0, ties to the lowest
index.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import checks
from .dispatch import backend_for
from .registration import register


def topk_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    """Mark the k largest entries of each row, exactly min(k, N), in the fixed order. Never waits for the device.

    Args:
        scores: (B, *shape), rows of N entries; float64, float32, float16 or bfloat16.
        k: an int >= 0, or int64 (B,) with one per row, clamped to [0, N].
    Returns:
        uint8 mask of the same shape. Not differentiable (``sparse_apply`` has a straight-through gradient).
    Raises:
        ValueError, TypeError: a negative int, or shapes, dtypes or devices that do not fit, naming the argument.
    """
    checks.floating("scores", scores)
    if not scores.ndim:
        raise ValueError("scores: found 0 dimensions; expected (B, *shape)")
    checks.budget(k, scores, "scores")
    return _topk_mask(_rows(scores.detach()), *_split(k)).reshape(scores.shape)


def sparse_apply(
    x: Tensor, p: Tensor, scores: Tensor, k: int | Tensor, *, projected: bool = True
) -> tuple[Tensor, Tensor]:
    """Change the k best-scored pixels of each image: clamp(x + p, 0, 1) there, bit-identical x elsewhere.

    Args:
        x, p: (B, C, *spatial), images in [0, 1] and changes to add; float32 or float64 (on GPU also half types).
        scores: (B, *spatial), one per pixel, for all its channels.
        k: as in ``topk_mask``.
        projected: the straight-through gradient of p, for a gradient G of the result: G where selected (True), or
            G sigmoid(scores) everywhere. The gradient of scores is the sum over channels of G p, that of x is G.
    Returns:
        images (B, C, *spatial) and the uint8 mask (B, *spatial). A second derivative raises.
    Raises:
        ValueError, TypeError: as in ``topk_mask``. Source: sPGD, arXiv 2405.05075.
    """
    checks.floating("x", x)
    checks.channels("x", x)
    pixels = (len(x), *x.shape[2:])
    for name, values, shape in (("p", p, tuple(x.shape)), ("scores", scores, pixels)):
        checks.same_as(name, values, x, "x")
        checks.shape(name, values, shape)
    checks.budget(k, x, "x")
    images, mask = _sparse_apply(_images(x), _images(p), _rows(scores), *_split(k), projected)
    return images.reshape(x.shape), mask.reshape(pixels)


def spgd_step(
    gradient: Tensor, p: Tensor, m: Tensor, x: Tensor, mask: Tensor, k: int | Tensor,
    *, alpha: float, beta: float, projected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One update of sPGD given the gradient of the loss at the perturbed images (arXiv 2405.05075), in one pass.

    Moves the logits m by beta sqrt(N) along the normalised gradient of the mask, except in rows whose gradient norm is
    not finite or below 2e-10; moves the magnitudes p by alpha along the gradient's sign (no step for NaN) within
    [-1, 1] and the image box; then selects anew. Never waits for the device.

    Args:
        gradient, p, x: (B, C, *spatial); float32 or float64 (on GPU also half types). For single features instead of
            pixels pass (B, 1, N) views.
        m: (B, *spatial) logits; compared instead of their sigmoids, which tie from 17 upward.
        mask: uint8 (B, *spatial), the selection by the given m.
        k: as in ``topk_mask``.
        alpha, beta: step sizes.
        projected: whether only selected pixels move (sPGD_p) or all (sPGD_u).
    Returns:
        new p, m, mask, perturbed images, and whether each image's mask changed, bool (B,). Not differentiable.
    Raises:
        ValueError, TypeError: as in ``topk_mask``.
    """
    checks.floating("x", x)
    checks.channels("x", x)
    pixels = (len(x), *x.shape[2:])
    for name, values, shape in (
        ("gradient", gradient, tuple(x.shape)), ("p", p, tuple(x.shape)), ("m", m, pixels)
    ):  # fmt: skip
        checks.same_as(name, values, x, "x")
        checks.shape(name, values, shape)
    if mask.dtype != torch.uint8:
        raise TypeError(f"mask: found {mask.dtype}; expected torch.uint8")
    checks.same_device("mask", mask, x, "x")
    checks.shape("mask", mask, pixels)
    checks.budget(k, x, "x")
    with torch.no_grad():
        p, m, mask, images, changed = _spgd_step(
            _images(gradient), _images(p), _rows(m), _images(x), _rows(mask), *_split(k), alpha, beta, projected
        )
    return p.reshape(x.shape), m.reshape(pixels), mask.reshape(pixels), images.reshape(x.shape), changed


def _images(x: Tensor) -> Tensor:
    """(B, C, *spatial) → (B, C, N), with explicit N, which torch cannot infer for B = 0."""
    return x.reshape(len(x), x.shape[1], math.prod(x.shape[2:]))


def _rows(scores: Tensor) -> Tensor:
    """(B, *spatial) → (B, N)."""
    return scores.reshape(len(scores), math.prod(scores.shape[1:]))


def _split(k: int | Tensor) -> tuple[Tensor | None, int]:
    """k as the ops take it: (one per row or None, one for all rows)."""
    return (k, 0) if isinstance(k, Tensor) else (None, k)


@torch.library.custom_op("certtrain::topk_mask", mutates_args=())
def _topk_mask(scores: Tensor, rows: Tensor | None, k: int) -> Tensor:
    return backend_for(scores).topk_mask(scores.contiguous(), rows, k)


def _fake_topk_mask(scores: Tensor, rows: Tensor | None, k: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.uint8)


register(_topk_mask, fake=_fake_topk_mask)


@torch.library.custom_op("certtrain::sparse_apply", mutates_args=())
def _sparse_apply(
    x: Tensor, p: Tensor, scores: Tensor, rows: Tensor | None, k: int, projected: bool
) -> tuple[Tensor, Tensor]:
    return backend_for(x).sparse_apply(x.contiguous(), p.contiguous(), scores.contiguous(), rows, k)


@torch.library.custom_op("certtrain::sparse_apply_backward", mutates_args=())
def _sparse_apply_backward(
    grad: Tensor, p: Tensor, scores: Tensor, mask: Tensor, projected: bool
) -> tuple[Tensor, Tensor]:
    share = mask.to(grad.dtype) if projected else torch.sigmoid(scores)
    return grad * share[:, None], (grad * p).sum(1)


def _fake_sparse_apply(
    x: Tensor, p: Tensor, scores: Tensor, rows: Tensor | None, k: int, projected: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scores.new_empty(scores.shape, dtype=torch.uint8)


def _fake_sparse_apply_backward(
    grad: Tensor, p: Tensor, scores: Tensor, mask: Tensor, projected: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), grad.new_empty(scores.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, p, scores, _, _, ctx.projected = inputs
    ctx.save_for_backward(p, scores, output[1])


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    for_p, for_scores = _sparse_apply_backward(grad, *ctx.saved_tensors, ctx.projected)
    return grad if ctx.needs_input_grad[0] else None, for_p, for_scores, None, None, None


register(
    _sparse_apply, fake=_fake_sparse_apply, backward=_sparse_apply_backward, fake_backward=_fake_sparse_apply_backward,
    save=_save, gradient=_gradient,
)  # fmt: skip


@torch.library.custom_op("certtrain::spgd_step", mutates_args=())
def _spgd_step(
    gradient: Tensor, p: Tensor, m: Tensor, x: Tensor, mask: Tensor, rows: Tensor | None, k: int,
    alpha: float, beta: float, projected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (t.contiguous() for t in (gradient, p, m, x, mask))
    return backend_for(x).spgd_step(*tensors, rows, k, alpha, beta, projected)


def _fake_spgd_step(
    gradient: Tensor, p: Tensor, m: Tensor, x: Tensor, mask: Tensor, rows: Tensor | None, k: int,
    alpha: float, beta: float, projected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    changed = x.new_empty(len(x), dtype=torch.bool)
    return p.new_empty(p.shape), m.new_empty(m.shape), mask.new_empty(mask.shape), x.new_empty(x.shape), changed


register(_spgd_step, fake=_fake_spgd_step)
