"""Perturbation sets: what an attacker may do to an image. A new threat model is one small file like this.

Every set is cut to valid images: it never leaves [0, 1].
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..config import Component
from ..errors import check
from ..noise import Noise
from .interval import Interval
from .region import Around, least


@dataclass(frozen=True)
class PerturbationSet(Component):
    """A set around each image x. Attacks, interval bounds and linear relaxations all go through it.

    ``epsilon`` is its size: the radius of a norm's ball in pixel units of [0, 1], the number k of pixels of a sparse
    one. Inside a training step it is a 0-d tensor.
    """

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
        return self

    def region(self, images: Tensor) -> Around:
        """This set around each of ``images`` (B, *shape): what bounds are computed over."""
        self.check_shape(images.shape[1:])
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
    """The ball of a norm, cut to valid images; ``epsilon`` is its radius in pixel units of [0, 1]."""

    epsilon: float = 0.1  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not isinstance(self.epsilon, Tensor):  # looking into a device's tensor would wait for the device
            number = isinstance(self.epsilon, (int, float)) and 0 <= self.epsilon < float("inf")
            check(number, "epsilon", self.epsilon, "a number >= 0, in pixel units of [0, 1]")

    def with_epsilon(self, epsilon: float | Tensor) -> Self:
        radius: Any = epsilon  # a 0-d tensor does a float's arithmetic
        return dataclasses.replace(self, epsilon=radius)

    def scaled(self, factor: float) -> Self:
        return self.with_epsilon(self.epsilon * factor)

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The change of size 1 (in the set's norm) along which a linear function of this gradient grows fastest,
        for each of a batch, as ``gradient``; 0 where the gradient is 0."""


@dataclass(frozen=True)
class LinfBall(NormBall):
    """|x' - x|_inf <= epsilon and 0 <= x' <= 1."""

    @property
    def is_box(self) -> bool:
        return True

    def ends(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper), both as ``images``: the set is all that lies between them."""
        return (images - self.epsilon).clamp(min=0), (images + self.epsilon).clamp(max=1)

    def hull(self, images: Tensor) -> Interval:
        return Interval.from_bounds(*self.ends(images))

    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        return candidates.clamp(*self.ends(images))

    def contains(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        return self.hull(images).contains(candidates, slack).flatten(1).all(1)

    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        return least(coefficients, self.hull(images))

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        return (2 * noise.uniform(images.shape[1:], stream, images.dtype) - 1) * self.epsilon


@dataclass(frozen=True)
class L2Ball(NormBall):
    """|x' - x|_2 <= epsilon and 0 <= x' <= 1."""

    def hull(self, images: Tensor) -> Interval:
        return Interval.box(images, self.epsilon)

    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        """Shrink towards the image, then clip. The clip only shrinks entries further, so the result lies in the set;
        it is the nearest point wherever the shrunk candidate is a valid image."""
        epsilon = torch.as_tensor(self.epsilon, dtype=torch.float64, device=images.device)
        change = candidates.double() - images.double()
        length = change.flatten(1).norm(dim=1).reshape(-1, *[1] * (images.ndim - 1))
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
        return valid & (change.norm(dim=1) <= epsilon + slack)

    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """By the Lagrangian dual of the norm constraint, which bounds the minimum from below at *every*
        multiplier: bisection only decides how tight it is, never whether it holds."""
        form, center = coefficients.flatten(2), images.flatten(1).unsqueeze(1)
        epsilon = torch.as_tensor(self.epsilon, dtype=images.dtype, device=images.device)
        with torch.no_grad():  # the envelope theorem: no gradient through the multiplier
            # |change| <= |form| / (2 multiplier): at multiplier = |form| / (2 epsilon) the ball is not left
            high = form.norm(dim=2, keepdim=True) / (2 * epsilon).clamp(min=1e-30)
            high = high.clamp(max=torch.finfo(form.dtype).max / 8)
            low = torch.zeros_like(high)
            for _ in range(40):
                middle = (low + high) / 2
                outside = _change(form, center, middle).norm(dim=2, keepdim=True) > epsilon
                low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
            change, multiplier = _change(form, center, high), high
        dual = form * change + multiplier * change.square()
        return (form @ center.transpose(1, 2)).squeeze(-1) + dual.sum(2) - (multiplier * epsilon.square()).squeeze(-1)

    def direction(self, gradient: Tensor) -> Tensor:
        size = gradient.abs().flatten(1).amax(1).reshape(-1, *[1] * (gradient.ndim - 1))
        scaled = gradient / torch.where(size > 0, size, 1)  # whose squares neither overflow nor vanish
        length = scaled.flatten(1).norm(dim=1).reshape(size.shape)
        return scaled / torch.where(length > 0, length, 1)

    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        along = self.direction(noise.normal(images.shape[1:], stream, images.dtype))
        share = noise.uniform((), f"{stream}/length", images.dtype) ** (1 / images[0].numel())
        return along * share.reshape(-1, *[1] * (images.ndim - 1)) * self.epsilon


def _change(form: Tensor, center: Tensor, multiplier: Tensor) -> Tensor:
    """The minimiser of <form, d> + multiplier |d|^2 over the valid changes -x <= d <= 1 - x."""
    free = -form / (2 * multiplier).clamp(min=1e-30)
    return torch.where(form == 0, 0, torch.maximum(torch.minimum(free, 1 - center), -center))
