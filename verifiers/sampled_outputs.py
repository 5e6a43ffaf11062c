"""Outputs of a network at points of boxes. They can refute a bound from other software; they prove nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bounds import Interval

MIXED = 8  # random corners, and as many random points inside


def rounding(values: Tensor) -> Tensor:
    """The largest difference between two evaluations that counts as rounding, entry by entry."""
    return 1e-6 + torch.finfo(values.dtype).eps ** 0.5 * values.abs()


@dataclass(frozen=True)
class SampledOutputs:
    """Points (P, B, *shape) of B boxes, and the model's logits (P, B, K) at them."""

    points: Tensor
    logits: Tensor

    @classmethod
    def of(cls, model: nn.Module, hull: Interval) -> SampledOutputs:
        """Evaluate at the centre, both ends, ``MIXED`` random corners and ``MIXED`` random points inside."""
        generator = torch.Generator().manual_seed(0)
        share = torch.rand((2 * MIXED, *hull.center.shape), generator=generator, dtype=hull.center.dtype)
        share[:MIXED].round_()
        share = share.to(hull.center.device)
        between = (hull.lower + share * (hull.upper - hull.lower)).clamp(hull.lower, hull.upper)
        points = torch.cat([torch.stack([hull.center, hull.lower, hull.upper]), between])
        return cls(points, torch.stack([model(point) for point in points]))

    def with_corner(self, model: nn.Module, hull: Interval, rows: Tensor, bounds: Tensor) -> SampledOutputs:
        """Add one corner for each box by a step of descent, on the row whose least value so far is nearest to its
        bound in ``bounds`` (B, R), from the point where it took that value."""
        values = self.values(rows)
        batch = torch.arange(len(bounds), device=bounds.device)
        row = (values.amin(0) - bounds).argmin(1)
        start = self.points[values.argmin(0)[batch, row], batch].requires_grad_()
        with torch.enable_grad():
            value = (model(start) * rows[batch, row]).sum()
        if not value.requires_grad:
            return self
        (slope,) = torch.autograd.grad(value, start)
        corner = torch.where(slope > 0, hull.lower, torch.where(slope < 0, hull.upper, start.detach()))
        return SampledOutputs(torch.cat([self.points, corner[None]]), torch.cat([self.logits, model(corner)[None]]))

    def values(self, rows: Tensor) -> Tensor:
        """(P, B, R) values of the rows (B, R, K)."""
        return torch.einsum("pbk,brk->pbr", self.logits, rows)

    def least(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(least, slack), each (B, R): the least values of the rows, NaN where one is NaN; and by how much rounding may
        lift a correct bound above them."""
        return self.values(rows).amin(0), rounding(torch.einsum("bk,brk->br", self.logits.abs().amax(0), rows.abs()))
