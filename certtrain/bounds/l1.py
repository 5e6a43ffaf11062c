"""The l1 ball."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..noise import Noise
from .interval import Interval, cut_box
from .perturbation import NormBall, Purpose


@dataclass(frozen=True)
class L1Ball(NormBall):
    """sum |x' - x| <= epsilon and 0 <= x' <= 1.

    ``direction`` moves a single entry, the same one again after [0, 1] has stopped it: attacks that step along it are
    weak.
    """

    norm: ClassVar[str | None] = "L1"
    default_attacks: ClassVar[Mapping[Purpose, Mapping[str, Any]]] = {
        "one_step": {"type": "FrankWolfe", "steps": 1},
        "many_steps": {"type": "FrankWolfe", "steps": 20},
        "accuracy": {"type": "FrankWolfe", "steps": 20},
        "search": {"type": "FrankWolfe", "steps": 100},
        "falsify": {"type": "FrankWolfe", "steps": 300},
    }

    @property
    def is_local(self) -> bool:
        return True

    def hull(self, images: Tensor) -> Interval:
        return cut_box(images, self.radius(images))

    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        """The nearest point of the set, in the Euclidean norm, up to rounding.

        All changes shrink towards 0 by the same threshold and are cut to [0, 1]. Their sum is a piecewise linear,
        falling function of the threshold; sorting its knots gives the threshold at which the sum is epsilon.
        """
        center = images.flatten(1).double()
        change = candidates.flatten(1).double() - center
        epsilon = torch.as_tensor(self.radius(change, torch.float64), dtype=torch.float64, device=images.device)
        size = change.abs()
        room = torch.where(change > 0, 1 - center, center)  # an entry shrinks from size - room on, to 0 at size
        threshold = _threshold(size, room, epsilon)
        kept = torch.minimum((size - threshold).clamp(min=0), room)
        total = kept.sum(1, keepdim=True)
        over = total > epsilon * (1 - 1e-12)
        kept = kept * torch.where(over, epsilon / total.clamp(min=1e-300) * (1 - 1e-12), 1.0)
        nearest = (center + change.sign() * kept).to(images.dtype)
        # rounding must not leave the ball: entries that it moved away from the image go back by one ulp
        flat = images.flatten(1)
        nearest = torch.where((nearest.double() - center).abs() > kept, torch.nextafter(nearest, flat), nearest)
        inside = self.contains(images, candidates.clamp(0, 1)).reshape(-1, *[1] * (images.ndim - 1))
        return torch.where(inside, candidates, nearest.reshape(images.shape)).clamp(0, 1)

    def contains(self, images: Tensor, candidates: Tensor, slack: float = 0.0) -> Tensor:
        change = (candidates.double() - images.double()).flatten(1)
        valid = ((candidates >= -slack) & (candidates <= 1 + slack)).flatten(1).all(1)
        epsilon = torch.as_tensor(self.epsilon, dtype=torch.float64, device=images.device)
        return valid & (change.abs().sum(1) <= epsilon + slack)

    def concretise(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """The minimum over the set, exact up to rounding: a fractional knapsack.

        The entries with the largest coefficients move to their end of [0, 1], in order, until epsilon is spent.
        """
        forms, center = coefficients.flatten(2), images.flatten(1).unsqueeze(1)
        epsilon = torch.as_tensor(self.radius(forms, torch.float64), dtype=torch.float64, device=images.device)
        order = forms.detach().abs().argsort(dim=2, descending=True, stable=True)
        room = torch.where(forms > 0, center, 1 - center).double().gather(2, order)
        left = epsilon - (room.cumsum(2) - room)
        spent = torch.minimum(room, left.clamp(min=0)).to(forms.dtype)
        gains = forms.abs().gather(2, order) * spent
        return (forms * center).sum(2) - gains.sum(2)

    def direction(self, gradient: Tensor) -> Tensor:
        """A unit step of the entry with the largest gradient; the first one if several are largest."""
        flat = gradient.flatten(1)
        first = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter(1, first, flat.gather(1, first).sign()).reshape(gradient.shape)

    def sample(self, images: Tensor, noise: Noise, stream: str) -> Tensor:
        """A change drawn uniformly from the l1 ball.

        The first n of n + 1 exponential numbers, over the sum of all, are uniform in the simplex; signs are random.
        """
        shape, count = images.shape[1:], images[0].numel() if len(images) else 0
        sizes = -torch.log1p(-noise.uniform((count + 1,), f"{stream}/sizes", torch.float64))
        shares = sizes[:, :count] / sizes.sum(1, keepdim=True)
        signs = 2 * noise.integers(2, (count,), f"{stream}/signs") - 1
        return (shares * signs).reshape(len(images), *shape).to(images.dtype) * self.radius(images)


def _threshold(size: Tensor, room: Tensor, epsilon: Tensor) -> Tensor:
    """(B, 1): the least t >= 0 at which sum_i min(max(size_i - t, 0), room_i) <= epsilon, for (B, n) numbers."""
    # the sum's slope is -1 for each entry between its two knots, size - room and size
    knots, order = torch.cat([(size - room).clamp(min=0), size], 1).sort(dim=1)
    slopes = torch.cat([-torch.ones_like(size), torch.ones_like(size)], 1).gather(1, order).cumsum(1)
    start = torch.minimum(size, room).sum(1, keepdim=True)  # at t = 0, and up to the first knot
    falls = (slopes[:, :-1] * knots.diff(dim=1)).cumsum(1)
    values = torch.cat([start, start + falls], 1)  # at each knot
    last = (values > epsilon).sum(1, keepdim=True) - 1  # the last knot whose sum exceeds epsilon
    before = last.clamp(min=0)
    slope = slopes.gather(1, before)
    step = (epsilon - values.gather(1, before)) / torch.where(slope < 0, slope, -1)
    threshold = knots.gather(1, before) + step.clamp(min=0)
    return torch.where(last < 0, 0.0, threshold)
