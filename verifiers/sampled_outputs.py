"""What a network was seen to do at points of boxes: a net below the bounds of other people's software, no proof."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bounds import Interval

MIXED = 8  # points at corners, and as many inside


def rounding(values: Tensor) -> Tensor:
    """What two evaluations may differ by, at values of that size."""
    return 1e-6 + torch.finfo(values.dtype).eps ** 0.5 * values.abs()


@dataclass(frozen=True)
class SampledOutputs:
    """Points (P, B, *shape) of B boxes, and the model's logits (P, B, K) at them."""

    points: Tensor
    logits: Tensor

    @classmethod
    def of(cls, model: nn.Module, hull: Interval) -> SampledOutputs:
        """At the centre, both ends, and ``MIXED`` points each at corners and inside."""
        generator = torch.Generator().manual_seed(0)
        share = torch.rand((2 * MIXED, *hull.center.shape), generator=generator, dtype=hull.center.dtype)
        share[:MIXED].round_()
        share = share.to(hull.center.device)
        between = (hull.lower + share * (hull.upper - hull.lower)).clamp(hull.lower, hull.upper)
        points = torch.cat([torch.stack([hull.center, hull.lower, hull.upper]), between])
        return cls(points, torch.stack([model(point) for point in points]))

    def further(self, model: nn.Module, hull: Interval, rows: Tensor, found: Tensor) -> SampledOutputs:
        """One corner more for each box: against the gradient of the row that is nearest to its bound, at its best."""
        values = self.values(rows)
        batch = torch.arange(len(found), device=found.device)
        row = (values.amin(0) - found).argmin(1)
        start = self.points[values.argmin(0)[batch, row], batch].requires_grad_()
        with torch.enable_grad():
            value = (model(start) * rows[batch, row]).sum()
        if not value.requires_grad:
            return self
        (slope,) = torch.autograd.grad(value, start)
        corner = torch.where(slope > 0, hull.lower, torch.where(slope < 0, hull.upper, start.detach()))
        return SampledOutputs(torch.cat([self.points, corner[None]]), torch.cat([self.logits, model(corner)[None]]))

    def values(self, rows: Tensor) -> Tensor:
        """(P, B, R) of the rows (B, R, K)."""
        return torch.einsum("pbk,brk->pbr", self.logits, rows)

    def least(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B, R) the least values of the rows, NaN where one is, and what rounding may add to a bound of them."""
        return self.values(rows).amin(0), rounding(torch.einsum("bk,brk->br", self.logits.abs().amax(0), rows.abs()))
