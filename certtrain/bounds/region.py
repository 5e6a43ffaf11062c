"""Regions of inputs, over which bounds are computed and verifiers search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from .interval import Interval, check_pixels

if TYPE_CHECKING:
    from .perturbation import PerturbationSet

    SetT = TypeVar("SetT", bound=PerturbationSet)


class Region(ABC):
    """One set of inputs for each problem of a batch of B; ``images`` (B, *shape) holds one point of each set."""

    images: Tensor

    @property
    @abstractmethod
    def hull(self) -> Interval:
        """The smallest boxes around the sets, wider by an ulp at most."""

    @property
    @abstractmethod
    def is_box(self) -> bool:
        """Whether the sets equal their ``hull``; bounds of any other set take their first layer from ``concretise``."""

    @abstractmethod
    def take(self, index: Tensor) -> Self:
        """The sets of the problems ``index``."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The sets with a conversion, such as of dtype, applied to the tensors that describe them."""

    @abstractmethod
    def windows(self, of: Tensor, function: Callable[[Tensor], Tensor]) -> Region:
        """The sets' projections to windows of the images; sets that contain them where ``is_local`` is False.

        Args:
            of: the number of each window's image.
            function: cuts the windows out of images.
        """

    @property
    def has_windows(self) -> bool:
        """Whether ``windows`` is available."""
        return self.is_local

    def perturbation(self, kind: type[SetT]) -> SetT | None:
        """The perturbation set around ``images``, if the region is made of one of this class; else None."""
        return None

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether a set's projection to a window of the image is a set of the same kind around the window."""

    @abstractmethod
    def contains(self, points: Tensor) -> Tensor:
        """(B,) bool: whether each point (B, *shape) lies in its set."""

    @abstractmethod
    def nearest(self, points: Tensor) -> Tensor:
        """Points (B, *shape) of any dtype, rounded to the sets' dtype and projected onto the sets."""

    @abstractmethod
    def concretise(self, forms: Tensor) -> Tensor:
        """(B, R): the minimum of linear forms (B, R, *shape) over each set, or a lower bound of it, up to rounding."""

    def check(self) -> None:
        """Refuse invalid sets by their values, on any device.

        Raises:
            InputError: a number is NaN or infinite, ends cross, or a size or a pixel is out of range.
        """
        self.hull.check()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def kind(self) -> str:
        """The class name of its sets, which messages use."""
        return type(self).__name__

    def to(self, dtype: torch.dtype) -> Self:
        """The same sets in another dtype."""
        return self.map(lambda x: x.to(dtype))


@dataclass(frozen=True)
class Around(Region):
    """A perturbation set around each of ``images``."""

    ball: PerturbationSet
    images: Tensor

    @property
    def hull(self) -> Interval:
        return self.ball.hull(self.images)

    @property
    def is_box(self) -> bool:
        return self.ball.is_box

    @property
    def kind(self) -> str:
        return self.ball.kind

    @property
    def is_local(self) -> bool:
        return self.ball.is_local

    @property
    def has_windows(self) -> bool:
        return True

    def check(self) -> None:
        check_pixels(self.images)
        if isinstance(size := self.ball.epsilon, Tensor):
            self.ball.with_epsilon(size.cpu())

    def take(self, index: Tensor) -> Around:
        return Around(self.ball.take(index), self.images[index])

    def perturbation(self, kind: type[SetT]) -> SetT | None:
        return self.ball if kind.matches(self.ball) else None

    def windows(self, of: Tensor, function: Callable[[Tensor], Tensor]) -> Region:
        if (local := self.ball.windowed()) is None:
            hull = self.hull
            return Box(function(hull.lower), function(hull.upper))
        return Around(local.take(of), function(self.images))

    def map(self, function: Callable[[Tensor], Tensor]) -> Around:
        return Around(self.ball, function(self.images))

    def contains(self, points: Tensor) -> Tensor:
        return self.ball.contains(self.images, points)

    def nearest(self, points: Tensor) -> Tensor:
        return self.ball.project(self.images, points.to(self.images.dtype))

    def concretise(self, forms: Tensor) -> Tensor:
        return self.ball.concretise(forms, self.images)


@dataclass(frozen=True)
class Box(Region):
    """All x with lower <= x <= upper, in the network's own units.

    Args:
        lower, upper: (B, *shape), finite floats of one dtype.
    Raises:
        InputError: other ends.
    """

    lower: Tensor
    upper: Tensor
    images: Tensor = field(init=False)
    _hull: Interval | None = field(init=False, default=None, repr=False, compare=False)  # computed at its first use

    def __post_init__(self) -> None:
        same = self.lower.shape == self.upper.shape and self.lower.dtype == self.upper.dtype
        if not same or not self.lower.is_floating_point():
            found = " and ".join(f"{end.dtype} {(*end.shape,)}" for end in (self.lower, self.upper))
            raise InputError(f"box: found ends of {found}; accepted: two tensors of floats of one shape and dtype")
        if not ((self.lower <= self.upper) & (self.lower > -torch.inf) & (self.upper < torch.inf)).all():
            raise InputError("box: found crossed ends, NaN or infinity; accepted: finite ends, lower <= upper")
        object.__setattr__(self, "images", self.nearest(self.lower / 2 + self.upper / 2))  # a sum may overflow

    @property
    def hull(self) -> Interval:
        if self._hull is not None:
            return self._hull
        hull = Interval.from_bounds(self.lower, self.upper)
        if not hull.center.requires_grad:  # each use is to have a gradient graph of its own
            object.__setattr__(self, "_hull", hull)
        return hull

    @property
    def is_box(self) -> bool:
        return True

    @property
    def is_local(self) -> bool:
        return True

    def windows(self, of: Tensor, function: Callable[[Tensor], Tensor]) -> Box:
        return self.map(function)

    def take(self, index: Tensor) -> Box:
        return Box(self.lower[index], self.upper[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Box:
        return Box(function(self.lower), function(self.upper))

    def contains(self, points: Tensor) -> Tensor:
        return ((self.lower <= points) & (points <= self.upper)).flatten(1).all(1)

    def nearest(self, points: Tensor) -> Tensor:
        return points.to(self.lower.dtype).clamp(self.lower, self.upper)

    def concretise(self, forms: Tensor) -> Tensor:
        return least(forms, self.hull)


def least(forms: Tensor, box: Interval) -> Tensor:
    """(B, R): the exact minimum, up to rounding, of linear forms (B, R, *shape) over a box."""
    center, radius = (part.flatten(1).unsqueeze(-1) for part in (box.center, box.radius))
    flat = forms.flatten(2)
    return (flat @ center - flat.abs() @ radius).squeeze(-1)
