"""The value types of bounding: ``Interval`` for the fused kernels, ``Bounds`` for verifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Interval:
    """All x with |x - center| <= radius, entrywise; the form that kernels read and write.

    Args:
        center, radius: equal shape, dtype and device; radius >= 0. An invalid interval, such as one with crossed ends,
            has a radius of NaN, which propagates to all bounds over it.
    """

    center: Tensor
    radius: Tensor

    @property
    def lower(self) -> Tensor:
        return self.center - self.radius

    @property
    def upper(self) -> Tensor:
        return self.center + self.radius

    @classmethod
    def from_bounds(cls, lower: Tensor, upper: Tensor) -> Interval:
        """The interval between two ends, in any units, its radius rounded outward; NaN where not ``lower <= upper``.

        Guarantees ``.lower <= lower`` and ``.upper >= upper`` in floating point and in exact arithmetic, and
        a radius of exactly 0 where the ends are equal. Without outward rounding, 1 to 20 % of real pixel
        boxes lose a corner. Gradients are those of the plain (upper + lower) / 2 and (upper - lower) / 2.
        """
        center = (lower + upper) / 2
        center = torch.where(center.isfinite(), center, lower / 2 + upper / 2)  # the sum may overflow
        radius = torch.maximum(upper - center, center - lower)
        with torch.no_grad():  # each difference above has an error of half an ulp at most: one ulp covers it
            outward = torch.nextafter(radius, torch.full_like(radius, torch.inf)) - radius
            outward = torch.where(lower == upper, 0, torch.where(lower < upper, outward, torch.nan))
        return cls(center, radius + outward)

    @classmethod
    def box(cls, images: Tensor, epsilon: float | Tensor) -> Interval:
        """The ball of radius ``epsilon`` around each image, cut to valid pixels: [x - eps, x + eps] ∩ [0, 1].

        Args:
            images: any shape, in [0, 1].
            epsilon: in pixel units of [0, 1]; a number or a 0-d tensor, rounded to the images' dtype; or a tensor that
                broadcasts with the images.
        Raises:
            InputError: pixels outside [0, 1] or NaN; a radius that is negative or NaN.
        """
        check_pixels(images)
        if not (torch.as_tensor(epsilon) >= 0).all():
            found = epsilon if not isinstance(epsilon, Tensor) or epsilon.numel() == 1 else "negative ones or NaN"
            raise InputError(f"epsilon: found {found}; accepted: radii >= 0, in pixel units of [0, 1]")
        return cut_box(images, epsilon)

    @classmethod
    def point(cls, value: Tensor) -> Interval:
        """The interval that holds ``value`` alone."""
        return cls(value, torch.zeros_like(value))

    def map(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """Apply a rearrangement of entries (reshape, flatten, index) to center and radius alike."""
        return Interval(function(self.center), function(self.radius))

    def contains(self, value: Tensor, slack: float | Tensor = 0.0) -> Tensor:
        """Entrywise: whether ``value`` lies within the ends, up to ``slack``; False for NaN."""
        return (self.lower - slack <= value) & (value <= self.upper + slack)

    def tightened_to_maximum(self, *others: Interval) -> Interval:
        """This interval of max(others), intersected with the maximum of the others' ends."""
        lower, upper = (torch.stack(ends).amax(0) for ends in ([x.lower for x in others], [x.upper for x in others]))
        return Bounds(lower, upper).intersect(self.bounds()).uncrossed().interval()

    def bounds(self) -> Bounds:
        return Bounds(self.lower, self.upper)

    def invalid_to_nan(self) -> Interval:
        """This interval, its radius NaN where it is negative or NaN."""
        return Interval(self.center, torch.where(self.radius >= 0, self.radius, torch.nan))

    def check(self) -> None:
        """Refuse an invalid interval.

        Raises:
            InputError: shapes differ, a radius is negative, or a number is NaN or infinite.
        """
        if self.center.shape != self.radius.shape:
            found = f"{(*self.center.shape,)} and {(*self.radius.shape,)}"
            raise InputError(f"box: found a center and a radius of shapes {found}; accepted: equal ones")
        (low, high), (least, most) = _ends(self.center), _ends(self.radius)
        if not ((low > -torch.inf) & (high < torch.inf) & (least >= 0) & (most < torch.inf)):
            raise InputError(
                "box: found crossed ends, a negative radius, or NaN or infinity; accepted: finite ends, lower <= upper"
            )


def cut_box(images: Tensor, epsilon: float | Tensor) -> Interval:
    """``Interval.box`` without checks of values, which would wait for the GPU in every training step; pixels outside
    [0, 1] and radii that are negative or NaN give NaN."""
    inside = (images >= 0) & (images <= 1)
    lower, upper = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    return Interval.from_bounds(torch.where(inside, lower, torch.nan), upper)


def check_pixels(images: Tensor, where: str = "images") -> None:
    """Refuse images in other units.

    Raises:
        InputError: pixels outside [0, 1], or NaN.
    """
    low, high = _ends(images)
    if not ((low >= 0) & (high <= 1)):
        values = images.detach().double()
        found = "NaN" if values.isnan().any() else f"pixels from {values.min():.6g} to {values.max():.6g}"
        raise InputError(
            f"{where}: found {found}; accepted: images in [0, 1]. In other units Interval.from_bounds(lower, upper) "
            "and Box(lower, upper) are bounded as they are, without a cut"
        )


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of values, 0-d: NaN if any is NaN, 0 if there are none.

    On 50,000 values it takes a quarter of the time of entrywise comparisons.
    """
    if not values.numel():
        return values.new_zeros(()), values.new_zeros(())
    return values.detach().aminmax()


@dataclass(frozen=True)
class Bounds:
    """Two ends, entrywise lower <= upper, which verifiers keep and intersect."""

    lower: Tensor
    upper: Tensor

    def intersect(self, other: Bounds) -> Bounds:
        """The tighter ends of two valid bounds, entry by entry; also valid, but for ends that rounding crosses."""
        return Bounds(torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper))

    def uncrossed(self) -> Bounds:
        """Upper ends raised to the lower ones where these are larger: rounding crosses ends that are nearly equal, and
        lines over crossed ends may be NaN or infinite."""
        return Bounds(self.lower, torch.where(self.lower > self.upper, self.lower, self.upper))

    def interval(self) -> Interval:
        return Interval.from_bounds(self.lower, self.upper)
