"""The sharpest directions of the loss in the weights: eigenvalues of its Hessian, by Lanczos."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, check
from ..labels import check_logits
from ..noise import Noise, key_of
from ..step import Batch

BATCH = 128
"""Images whose second derivatives are computed at once: their graph holds about three float64 forward passes."""
RESTARTS = 300

Losses = Callable[[Tensor, Tensor], Tensor]
"""Losses (B,) as a function of logits (B, K) and labels (B,)."""


@dataclass(frozen=True)
class Spectrum:
    """The extreme part of a spectrum.

    Args:
        values: eigenvalues, the largest first (``LM``: the largest in size).
        residuals: |H v - value · v| for each value and its unit vector v: H has an eigenvalue within that distance.
        weights: number of rows of H.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    weights: int


def hessian_spectrum(
    model: nn.Module, batch: Batch, top: int = 10, *, which: Literal["LA", "LM"] = "LA", losses: Losses | None = None
) -> Spectrum:
    """The ``top`` eigenvalues of the Hessian of the mean loss on a fixed batch, with respect to all trainable weights.

    Lanczos' method on Hessian-vector products (as PyHessian, arXiv 1912.07145) of a float64 copy of the network in
    evaluation mode, from a fixed start vector. A product is two backward passes, the second through the first, so that
    no layer needs forward-mode differentiation.

    Args:
        top: from 1 to the number of weights - 1.
        which: the largest eigenvalues (LA) or the largest in size (LM).
        losses: the loss of each image; the cross-entropy by default.
    Raises:
        InputError: the batch is empty, ``top`` or ``which`` out of range, or the eigenvalues do not settle.
    """
    return eigenpairs(model, batch, top, which=which, losses=losses)[0]


def eigenpairs(
    model: nn.Module, batch: Batch, top: int, *, which: Literal["LA", "LM"] = "LA", losses: Losses | None = None
) -> tuple[Spectrum, Tensor]:
    """``hessian_spectrum`` and the unit eigenvectors (top, n) float64, with entries ordered as by ``hessian_product``.

    The entry of largest size of each vector is positive, which fixes the sign.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    check(which in ("LA", "LM"), "which", which, "LA, LM")
    product, size, device = hessian_product(model, batch, losses)
    check(1 <= top < size, "top", top, f"1 to {size - 1}, the number of weights - 1")

    def multiply(vector: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(vector.reshape(-1)).to(device)).cpu().numpy()

    start = Noise(key_of("lanczos"), torch.zeros(1, dtype=torch.int64)).normal((size,), dtype=torch.float64)[0].numpy()
    solve: Any = eigsh  # whose types say that a tolerance is whole
    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)  # type: ignore[call-arg]
    try:
        values, vectors = solve(operator, k=top, which=which, v0=start, tol=1e-8, maxiter=RESTARTS)
    except ArpackNoConvergence as error:
        settled = len(error.eigenvalues)
        raise InputError(
            f"top: found {top} eigenvalues of which {settled} settled in {RESTARTS} restarts; accepted: fewer"
        ) from error
    order = np.argsort(-(values if which == "LA" else np.abs(values)))
    off = [float(np.linalg.norm(multiply(vectors[:, i]) - values[i] * vectors[:, i])) for i in order]
    rows = torch.from_numpy(np.ascontiguousarray(vectors[:, order].T)).to(device)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return Spectrum(tuple(float(values[i]) for i in order), tuple(off), size), rows * largest.sign()


def hessian_product(
    model: nn.Module, batch: Batch, losses: Losses | None = None
) -> tuple[Callable[[Tensor], Tensor], int, torch.device]:
    """The Hessian of ``hessian_spectrum`` as (v -> H v for float64 vectors (n,), n, their device).

    Entries follow the trainable ones of ``model.parameters()``. The model is left unchanged.
    """
    check(len(batch), "batch", len(batch), "one image or more")
    twin, weights = trained_twin(model, torch.float64)
    each = losses or _cross_entropy

    def product(vector: Tensor) -> Tensor:
        pieces = [piece.view_as(w) for piece, w in zip(vector.split([w.numel() for w in weights]), weights)]
        total = torch.zeros_like(vector)
        for first in range(0, len(batch), BATCH):
            part = batch.part(slice(first, first + BATCH))
            with torch.enable_grad():
                loss = each(twin(part.images.double()), part.labels).sum() / len(batch)
                gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
                along = torch.stack([(gradient * piece).sum() for gradient, piece in zip(gradients, pieces)]).sum()
            seconds = torch.autograd.grad(along, weights, materialize_grads=True)
            total += torch.cat([second.reshape(-1) for second in seconds])
        return total

    return product, sum(weight.numel() for weight in weights), weights[0].device


def trained_twin(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the network in evaluation mode, in ``dtype`` if one is given, and its trainable weights.

    Raises:
        InputError: no weights are trainable.
    """
    twin = copy.deepcopy(model).eval()
    twin = twin if dtype is None else twin.to(dtype)
    weights = [weight for weight in twin.parameters() if weight.requires_grad]
    check(weights, "model", "no weights that are trained", "a network with some")
    return twin, weights


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    check_logits(logits, labels)
    return F.cross_entropy(logits, labels, reduction="none")
