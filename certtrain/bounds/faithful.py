"""Is the program that is bounded the network that runs? Asked by comparing their logits.

torch.fx records operations: what changes them from outside, such as ``torch.autocast`` inside forward or a global that
forward reads, leaves no trace in the program.
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
"""Of a larger batch ``check_faithful`` compares so many: what makes a program another network does so everywhere."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Of the largest logit. Sums in another order leave 1e-6 in float32, folded batch norms somewhat more; the halves of
autocast leave 1e-4 or more, float32 inside a float64 network 1e-8 or more."""

ROUNDINGS = 16
"""How many times the program's own rounding error, found in float64, is taken for rounding where logits are small
beside what they are computed of."""


@torch.no_grad()
def checked_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The program's logits (B, K) of ``images`` (B, *shape), as far from the model's own as rounding explains.

    The model is traced anew, and judged in evaluation mode; its modes and buffers are restored. It runs twice: on all
    images, in reversed order, and on one of them alone.

    Raises:
        UnsupportedNode: the model holds an operation without a rule.
        InputError: its logits are no function of one image, or the program's differ from them.
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
    """Refuse a model whose program differs from it at the centre, or at a random point, of any of the first boxes.

    Raises:
        UnsupportedNode, InputError: as ``checked_logits``.
    """
    if isinstance(model, Network) or _own(model) is None:
        return
    hull = box.hull if isinstance(box, Region) else box
    center, radius = hull.center[:IMAGES].detach(), hull.radius[:IMAGES].detach()
    generator = torch.Generator(center.device).manual_seed(0)
    place = torch.empty_like(center).uniform_(-1, 1, generator=generator)
    checked_logits(model, torch.cat([center, center + place * radius]))


def check_one_image(model: nn.Module, images: Tensor, allows: Callable[[Tensor, Tensor], bool] | None = None) -> Tensor:
    """The model's logits of images, if those of each depend on that image alone.

    Args:
        allows: whether two tensors of logits differ by rounding; None for ``TOLERANCE``.
    Raises:
        InputError: one image alone, or the same ones in another order, get other logits.
    """
    # a batch of one is compared with a batch of two
    others = images[:1].mul(0.5) if len(images) == 1 else images[:0]
    together = model(torch.cat([images, others]).flip(0)).flip(0)[: len(images)]
    alone = model(images[:1].clone())
    allows = allows or _Tolerance(None, images, together).allows
    first = together[:1]
    if first.shape != alone.shape or not allows(first, alone):
        raise InputError(
            f"{type(model).__name__}: one image alone gets {_difference(alone, first)} than among "
            f"{len(images) + len(others)}; accepted: a network whose logits of an image depend on that image alone"
        )
    return together


def _own(model: nn.Module | Network) -> nn.Module | None:
    """What runs, if that is not the program itself."""
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
    """How far logits may be apart."""

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
        """The program's own rounding error on these images: beyond float64 nothing is known, and 0 is the answer."""
        whole = isinstance(self.model, NetworkModule)
        if self.model is None or whole or self.logits.dtype == torch.float64:
            return 0.0
        exact = fold(self.model, self.images.shape[1:], dtype=torch.float64, whole_pools=True)(self.images.double())
        return float((exact - self.logits).abs().max())


def _difference(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f"logits of shape {tuple(one.shape)}, other ones ({tuple(other.shape)})"
    return f"other logits (by up to {float((one - other).abs().max()):.3g})"
