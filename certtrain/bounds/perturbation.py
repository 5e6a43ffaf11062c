"""Perturbation sets: what an attacker may do to an image. A new threat model is one small file like this.

Every set is cut to valid images: it never leaves [0, 1].
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from .. import devices
from ..config import Component
from ..errors import InputError, check
from ..noise import Noise
from ..typed import as_floats, norm
from .interval import Interval, check_pixels, cut_box
from .region import Around, least


@dataclass(frozen=True)
class PerturbationSet(Component):
    """A set around each image x. Attacks, interval bounds and linear relaxations all go through it.

    ``epsilon`` is its size: the radius of a norm's ball in pixel units of [0, 1], the number k of pixels of a sparse
    one. Inside a training step it is a 0-d tensor; where every image has its own, a tensor (B,).
    """

    size: ClassVar[str] = "epsilon"
    """What ``epsilon`` is called in messages."""

    @property
    @abstractmethod
    def epsilon(self) -> Any:
        """The size."""

    @abstractmethod
    def with_epsilon(self, epsilon: float | Tensor) -> Self:
        """The same kind of set with another size."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """The same kind of set, so many times as large."""

    def take(self, index: Tensor) -> Self:
        """The sets of some images of a batch, by their numbers: differs where each image has a size of its own."""
        if not self._each_its_own():
            return self
        return self.with_epsilon(self.epsilon[index.to(self.epsilon.device)])

    def _each_its_own(self) -> bool:
        return isinstance(self.epsilon, Tensor) and self.epsilon.ndim == 1

    def region(self, images: Tensor) -> Around:
        """This set around each of ``images`` (B, *shape): what bounds are computed over.

        Raises:
            InputError: images that have no such set: another shape, or another number than there are sizes; on the CPU
                also pixels outside [0, 1] or NaN (on another device these would have to be waited for, in every step
                of a training: bounds over them are NaN).
        """
        self.check_shape(images.shape[1:])
        if self._each_its_own() and len(self.epsilon) != len(images):
            found = f"{len(self.epsilon)} numbers for {len(images)} images"
            raise InputError(f"{self.size}: found {found}; accepted: one, or one for each")
        if not devices.waits(images):
            check_pixels(images)
        return Around(self, images)

    def check_shape(self, shape: Sequence[int]) -> None:
        """
        Raises:
            InputError: images of this shape have no such set.
        """

    def remark(self, shape: Sequence[int]) -> str:
        """What is worth saying, once, of this set around images of ``shape``; empty for nothing."""
        return ""

    @property
    def is_box(self) -> bool:
        """Whether the set equals its ``hull``; bounds of any other set take their first layer from ``concretise``."""
        return False

    @property
    def is_local(self) -> bool:
        """Whether what the set leaves of a window of the image is a set of the same kind and size around the window."""
        return True

    def windowed(self) -> PerturbationSet:
        """A set that is local and holds this one: what is known of windows."""
        return self

    @abstractmethod
    def hull(self, images: Tensor) -> Interval:
        """The smallest box around the set, outward by an ulp at most."""

    @abstractmethod
    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        """A point of the set for each candidate, both (B, *shape); points of the set stay where they are."""

    @abstractmethod
    def contains(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        """(B,) bool: does each candidate lie in the set, give or take ``slack``?"""

    @abstractmethod
    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """The minimum over the set of each linear form <coefficients, x'>, never above it up to rounding.

        Args:
            coefficients: (B, S, *shape), S forms for each image.
            images: (B, *shape).
        Returns:
            (B, S), differentiable in the coefficients.
        """

    @abstractmethod
    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        """A random change for each of ``images`` (B, *shape), uniform in the norm's ball. The sum is in the set only
        once it is projected to [0, 1]."""


@dataclass(frozen=True)
class NormBall(PerturbationSet):
    """The ball of a norm, cut to valid images.

    Args:
        epsilon: its radius in pixel units of [0, 1]; or, where every image has its own, floats (B,).
    """

    epsilon: float = 0.1  # type: ignore[assignment]  # a field that stands for the property
    largest: ClassVar[float] = math.inf
    """The radius above which every image lies in the ball: more is a slip. In l1 and l2 it depends on the image's size,
    and a radius of 8 is ordinary."""

    def __post_init__(self) -> None:
        if isinstance(self.epsilon, Tensor):
            self._check_radii(self.epsilon)
            return
        given = cast(object, self.epsilon)  # by callers without a type checker
        number = not isinstance(given, bool) and isinstance(given, Real)
        check(number and 0 <= self.epsilon < math.inf, "epsilon", self.epsilon, self._accepted())
        check(self.epsilon <= self.largest, "epsilon", self.epsilon, self._accepted(self.epsilon))
        object.__setattr__(self, "epsilon", float(self.epsilon) if isinstance(self.epsilon, Real) else self.epsilon)

    def _check_radii(self, radii: Tensor) -> None:
        shape = f"{radii.dtype} of shape {(*radii.shape,)}"
        check(radii.is_floating_point() and radii.ndim <= 1, "epsilon", shape, "a number, or floats (B,)")
        if devices.waits(radii):  # see ``cut_box``
            return
        for radius in as_floats(radii[~((radii >= 0) & (radii < torch.inf))]):
            check(False, "epsilon", radius, self._accepted())
        if radii.ndim:  # a schedule's 0-d tensor may be a multiple of the recipe's radius
            for radius in as_floats(radii[radii > self.largest]):
                check(False, "epsilon", radius, self._accepted(radius))

    def _accepted(self, *meant: float) -> str:
        size = "a number >= 0" + ("" if self.largest == math.inf else f", at most {self.largest:g}")
        return f"{size}, in pixel units of [0, 1]" + "".join(f"; did you mean {float(size):g}/255?" for size in meant)

    def radius(self, like: Tensor, dtype: torch.dtype | None = None) -> float | Tensor:
        """``epsilon`` as it is combined with ``like`` (B, …): broadcast where every image has its own, and of the dtype
        of ``like``, unless another one is named, which more precise radii would raise it to."""
        if not self._each_its_own():
            return self.epsilon
        radii: Any = self.epsilon
        return radii.to(like.device, dtype or like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def region(self, images: Tensor) -> Around:
        check(images.is_floating_point(), "images", images.dtype, "floats in [0, 1]")
        return super().region(images)

    def with_epsilon(self, epsilon: float | Tensor) -> Self:
        radius: Any = epsilon  # a 0-d tensor does a float's arithmetic
        return dataclasses.replace(self, epsilon=radius)

    def scaled(self, factor: float) -> Self:
        check(0 <= factor < math.inf, "epsilon", f"{factor} times the radius", self._accepted())
        wider = copy.copy(self)  # unchecked: a multiple of a radius may well exceed 1
        object.__setattr__(wider, "epsilon", self.epsilon * factor)
        return wider

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The change of size 1 (in the set's norm) along which a linear function of this gradient grows fastest,
        for each of a batch, as ``gradient``; 0 where the gradient is 0."""


@dataclass(frozen=True)
class LinfBall(NormBall):
    """|x' - x|_inf <= epsilon and 0 <= x' <= 1."""

    largest: ClassVar[float] = 1.0

    @property
    def is_box(self) -> bool:
        return True

    def ends(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper), both as ``images``: the set is all that lies between them."""
        epsilon = self.radius(images)
        return (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)

    def hull(self, images: Tensor) -> Interval:
        return cut_box(images, self.radius(images))

    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        return candidates.clamp(*self.ends(images))

    def contains(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        return self.hull(images).contains(candidates, slack).flatten(1).all(1)

    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        return least(coefficients, self.hull(images))

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        return (2 * noise.uniform(images.shape[1:], stream, images.dtype) - 1) * self.radius(images)


@dataclass(frozen=True)
class L2Ball(NormBall):
    """|x' - x|_2 <= epsilon and 0 <= x' <= 1."""

    def hull(self, images: Tensor) -> Interval:
        return cut_box(images, self.radius(images))

    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        """Shrink towards the image, then clip. The clip only shrinks entries further, so the result lies in the set;
        it is the nearest point wherever the shrunk candidate is a valid image."""
        change = candidates.double() - images.double()
        epsilon = torch.as_tensor(self.radius(change, torch.float64), dtype=torch.float64, device=images.device)
        length = norm(change.flatten(1), dim=1).reshape(-1, *[1] * (images.ndim - 1))
        outside = length > epsilon
        change = change * torch.where(outside, epsilon / length.clamp(min=1e-300) * (1 - 1e-12), 1.0)
        shrunk = (images.double() + change).to(images.dtype)
        # rounding must not lead out of the ball: entries that it moved away from the image go one step back
        too_far = (shrunk.double() - images.double()).abs() > change.abs()
        shrunk = torch.where(too_far, torch.nextafter(shrunk, images), shrunk)
        return torch.where(outside, shrunk, candidates).clamp(0, 1)

    def contains(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        change = (candidates.double() - images.double()).flatten(1)
        valid = ((candidates >= -slack) & (candidates <= 1 + slack)).flatten(1).all(1)
        epsilon = torch.as_tensor(self.epsilon, dtype=torch.float64, device=images.device)
        return valid & (norm(change, dim=1) <= epsilon + slack)

    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """By the Lagrangian dual of the norm constraint, which bounds the minimum from below at *every*
        multiplier: bisection only decides how tight it is, never whether it holds."""
        form, center = coefficients.flatten(2), images.flatten(1).unsqueeze(1)
        epsilon = torch.as_tensor(self.radius(form), dtype=images.dtype, device=images.device)
        with torch.no_grad():  # the envelope theorem: no gradient through the multiplier
            # |change| <= |form| / (2 multiplier): at multiplier = |form| / (2 epsilon) the ball is not left
            high = norm(form, dim=2, keepdim=True) / (2 * epsilon).clamp(min=1e-30)
            high = high.clamp(max=torch.finfo(form.dtype).max / 8)
            low = torch.zeros_like(high)
            for _ in range(40):
                middle = (low + high) / 2
                outside = norm(_change(form, center, middle), dim=2, keepdim=True) > epsilon
                low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
            change, multiplier = _change(form, center, high), high
        dual = form * change + multiplier * change.square()
        return (form @ center.transpose(1, 2)).squeeze(-1) + dual.sum(2) - (multiplier * epsilon.square()).squeeze(-1)

    def direction(self, gradient: Tensor) -> Tensor:
        size = gradient.abs().flatten(1).amax(1).reshape(-1, *[1] * (gradient.ndim - 1))
        scaled = gradient / torch.where(size > 0, size, 1)  # whose squares neither overflow nor vanish
        length = norm(scaled.flatten(1), dim=1).reshape(size.shape)
        return scaled / torch.where(length > 0, length, 1)

    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        along = self.direction(noise.normal(images.shape[1:], stream, images.dtype))
        share = noise.uniform((), f"{stream}/length", images.dtype) ** (1 / images[0].numel())
        return along * share.reshape(-1, *[1] * (images.ndim - 1)) * self.radius(images)


def _change(form: Tensor, center: Tensor, multiplier: Tensor) -> Tensor:
    """The minimiser of <form, d> + multiplier |d|^2 over the valid changes -x <= d <= 1 - x."""
    free = -form / (2 * multiplier).clamp(min=1e-30)
    return torch.where(form == 0, 0, torch.maximum(torch.minimum(free, 1 - center), -center))
