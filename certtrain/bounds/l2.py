"""The l2 ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..noise import Noise
from ..typed import norm
from .interval import Interval, cut_box
from .perturbation import NormBall


@dataclass(frozen=True)
class L2Ball(NormBall):
    """|x' - x|_2 <= epsilon and 0 <= x' <= 1."""

    norm: ClassVar[str | None] = "L2"

    @property
    def is_local(self) -> bool:
        return True

    def hull(self, images: Tensor) -> Interval:
        return cut_box(images, self.radius(images))

    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        """Shrink towards the image, then clip to [0, 1], which shrinks changes further: the result lies in the set.

        It is the nearest point wherever the shrunk candidate is a valid image.
        """
        change = candidates.double() - images.double()
        epsilon = torch.as_tensor(self.radius(change, torch.float64), dtype=torch.float64, device=images.device)
        length = norm(change.flatten(1), 1).reshape(-1, *[1] * (images.ndim - 1))
        outside = length > epsilon
        change = change * torch.where(outside, epsilon / length.clamp(min=1e-300) * (1 - 1e-12), 1.0)
        shrunk = (images.double() + change).to(images.dtype)
        # rounding must not leave the ball: entries that it moved away from the image go back by one ulp
        too_far = (shrunk.double() - images.double()).abs() > change.abs()
        shrunk = torch.where(too_far, torch.nextafter(shrunk, images), shrunk)
        return torch.where(outside, shrunk, candidates).clamp(0, 1)

    def contains(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        change = (candidates.double() - images.double()).flatten(1)
        valid = ((candidates >= -slack) & (candidates <= 1 + slack)).flatten(1).all(1)
        epsilon = torch.as_tensor(self.epsilon, dtype=torch.float64, device=images.device)
        return valid & (norm(change, 1) <= epsilon + slack)

    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """A lower bound of the minimum by the Lagrangian dual of the norm constraint.

        The dual is sound at *every* multiplier: bisection only decides how tight it is.
        """
        form, center = coefficients.flatten(2), images.flatten(1).unsqueeze(1)
        epsilon = torch.as_tensor(self.radius(form), dtype=images.dtype, device=images.device)
        with torch.no_grad():  # the envelope theorem: no gradient through the multiplier
            # |change| <= |form| / (2 multiplier): at multiplier = |form| / (2 epsilon) it lies in the ball
            high = norm(form, 2, keepdim=True) / (2 * epsilon).clamp(min=1e-30)
            high = high.clamp(max=torch.finfo(form.dtype).max / 8)
            low = torch.zeros_like(high)
            for _ in range(40):
                middle = (low + high) / 2
                outside = norm(_change(form, center, middle), 2, keepdim=True) > epsilon
                low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
            change, multiplier = _change(form, center, high), high
        dual = form * change + multiplier * change.square()
        return (form @ center.transpose(1, 2)).squeeze(-1) + dual.sum(2) - (multiplier * epsilon.square()).squeeze(-1)

    def direction(self, gradient: Tensor) -> Tensor:
        size = gradient.abs().flatten(1).amax(1).reshape(-1, *[1] * (gradient.ndim - 1))
        scaled = gradient / torch.where(size > 0, size, 1)  # its squares neither overflow nor vanish
        length = norm(scaled.flatten(1), 1).reshape(size.shape)
        return scaled / torch.where(length > 0, length, 1)

    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        along = self.direction(noise.normal(images.shape[1:], stream, images.dtype))
        share = noise.uniform((), f"{stream}/length", images.dtype) ** (1 / images[0].numel())
        return along * share.reshape(-1, *[1] * (images.ndim - 1)) * self.radius(images)


def _change(form: Tensor, center: Tensor, multiplier: Tensor) -> Tensor:
    """The minimiser of <form, d> + multiplier |d|^2 over the valid changes -x <= d <= 1 - x."""
    free = -form / (2 * multiplier).clamp(min=1e-30)
    return torch.where(form == 0, 0, torch.maximum(torch.minimum(free, 1 - center), -center))
