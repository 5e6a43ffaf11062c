"""The l_inf ball, which is a box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..noise import Noise
from .interval import Interval, cut_box
from .perturbation import NormBall
from .region import least


@dataclass(frozen=True)
class LinfBall(NormBall):
    """|x' - x|_inf <= epsilon and 0 <= x' <= 1."""

    norm: ClassVar[str | None] = "Linf"
    largest_radius: ClassVar[float] = 1.0

    @property
    def is_box(self) -> bool:
        return True

    @property
    def is_local(self) -> bool:
        return True

    def ends(self, images: Tensor) -> tuple[Tensor, Tensor]:
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
