"""Check that a traced network computes what the model computes, by comparing their logits.

torch.fx records operations only. Whatever changes them from outside, such as ``torch.autocast`` inside forward or a
global variable that forward reads, leaves no trace in the network.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..precision import full_float32
from .folding import fold
from .forward import forward
from .interval import Interval
from .network import Network, NetworkModule
from .region import Region
from .tracing import evaluation_mode, forget

IMAGES = 32
"""Images of a larger batch that ``check_faithful`` compares: a wrongly traced network differs on any image."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Accepted difference, relative to the largest logit.

Measured: 1e-6 for sums in another order in float32, somewhat more for folded batch norms; 1e-4 or more for autocast,
1e-8 or more for float32 inside a float64 network."""

ROUNDINGS = 16
"""Accepted difference in multiples of the network's own rounding error (measured against float64), for logits that are
small compared with the numbers they are computed from."""


@torch.no_grad()
def checked_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The traced network's logits (B, K) of ``images`` (B, *shape), checked to equal the model's own up to rounding.

    Traces the model anew and compares in evaluation mode; its modes and buffers are restored. The model runs twice: on
    all images in reversed order, and on a single one.

    Raises:
        UnsupportedOperation: the model contains an operation without a rule.
        InputError: an image's logits depend on other images, or the network's logits differ from the model's.
    """
    own = _own(model)
    if own is None or not len(images):
        return forward(model, images).logits
    with full_float32(), evaluation_mode(own), _buffers_kept(own):
        forget(model)
        ours = forward(model, images).logits
        tolerance = _Tolerance(model, images, ours)
        theirs = check_one_image(own, images, tolerance.allows)
        if ours.shape != theirs.shape or not tolerance.allows(ours, theirs):
            raise InputError(
                f"{type(own).__name__}: the operations that were traced give {_difference(ours, theirs)} than the "
                "model itself; accepted: a forward whose operations torch.fx sees as they run (no autocast inside, "
                "no noise)"
            )
    return ours


@torch.no_grad()
def check_faithful(model: nn.Module | Network, box: Interval | Region) -> None:
    """Check a model against its traced network at the centre and a random point of each of the first ``IMAGES`` boxes.

    Raises:
        UnsupportedOperation, InputError: as in ``checked_logits``.
    """
    if isinstance(model, Network) or _own(model) is None:
        return
    hull = box.hull if isinstance(box, Region) else box
    center, radius = hull.center[:IMAGES].detach(), hull.radius[:IMAGES].detach()
    generator = torch.Generator(center.device).manual_seed(0)
    place = torch.empty_like(center).uniform_(-1, 1, generator=generator)
    checked_logits(model, torch.cat([center, center + place * radius]))


def check_one_image(model: nn.Module, images: Tensor, allows: Callable[[Tensor, Tensor], bool] | None = None) -> Tensor:
    """The model's logits of ``images``, after a check that an image's logits depend on that image alone.

    Args:
        allows: whether two tensors of logits differ by rounding only; None for ``TOLERANCE``.
    Raises:
        InputError: an image gets other logits by itself than within the batch.
    """
    # a single image is compared with a batch of two
    others = images[:1].mul(0.5) if len(images) == 1 else images[:0]
    together = model(torch.cat([images, others]).flip(0)).flip(0)[: len(images)]
    single = model(images[:1].clone())
    allows = allows or _Tolerance(None, images, together).allows
    first = together[:1]
    if first.shape != single.shape or not allows(first, single):
        raise InputError(
            f"{type(model).__name__}: one image alone gets {_difference(single, first)} than among "
            f"{len(images) + len(others)}; accepted: a network whose logits of an image depend on that image alone"
        )
    return together


def _own(model: nn.Module | Network) -> nn.Module | None:
    """The module that runs; None for a model that is itself a network of operations."""
    if isinstance(model, Network):
        return None
    if isinstance(model, NetworkModule):
        return model.runs
    return model


@contextmanager
def _buffers_kept(model: nn.Module) -> Generator[None]:
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        for buffer, version, value in kept:
            if buffer._version != version:
                buffer.copy_(value)


class _Tolerance:
    """The accepted difference between two tensors of logits."""

    def __init__(self, model: nn.Module | None, images: Tensor, logits: Tensor):
        self.model, self.images, self.logits = model, images, logits
        finite = logits[logits.isfinite()].abs()
        self.magnitude = float(finite.max()) if finite.numel() else 0.0
        self.share = TOLERANCE.get(logits.dtype, 100 * torch.finfo(logits.dtype).eps)

    def allows(self, one: Tensor, other: Tensor) -> bool:
        same = (one == other) | (one.isnan() & other.isnan())
        far = (one - other).abs()[~same]
        if not far.numel() or bool((far <= self.share * self.magnitude).all()):
            return True
        return bool((far <= ROUNDINGS * self._rounding()).all())

    def _rounding(self) -> float:
        """The network's own rounding error on these images, against float64; 0 where it cannot be measured."""
        is_network = isinstance(self.model, NetworkModule)
        if self.model is None or is_network or self.logits.dtype == torch.float64:
            return 0.0
        exact = fold(self.model, self.images.shape[1:], dtype=torch.float64, whole_pools=True)(self.images.double())
        return float((exact - self.logits).abs().max())


def _difference(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f"logits of shape {tuple(one.shape)}, other ones ({tuple(other.shape)})"
    return f"other logits (by up to {float((one - other).abs().max()):.3g})"
