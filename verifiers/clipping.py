"""Clipping of boxes: the parts in which linear bounds of a specification exclude counterexamples are cut off.

After the domain clipping of Clip-and-Verify (arXiv 2512.11087). At a counterexample of a clause every row of the clause
is <= 0, and so is every lower bound of a row, and of a weighted mean of rows. A linear lower bound form · x + constant
whose minimum over a box is m is <= t only where each input is at most (t - m) / |form_i| away from the end at which
the minimum is taken, whatever the other inputs are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import Box

MARGIN = 1e-3
"""Relative to -m: the level t > 0 that rows exceed in what is cut off, so that a bound of the whole set remains."""


@dataclass(frozen=True, eq=False)
class Cuts:
    """Linear lower bounds of rows of clauses over P boxes, or of weighted means of a clause's rows.

    Args:
        forms: (P, C, K, *shape), K for each clause, constants left out.
        least: (P, C, K) lower bounds of their minima over the box, constants included, rounded down; -inf for a form
            that cuts nothing.
    """

    forms: Tensor
    least: Tensor

    def joined(self, other: Cuts) -> Cuts:
        """All forms of both."""
        return Cuts(torch.cat([self.forms, other.forms], 2), torch.cat([self.least, other.least], 2))

    def replaced(self, index: Tensor, other: Cuts) -> Cuts:
        """The cuts with those of the boxes ``index`` replaced."""
        return Cuts(self.forms.index_copy(0, index, other.forms), self.least.index_copy(0, index, other.least))

    def clipped(self, box: Box, open_: Tensor) -> Part:
        """Clip boxes to what may hold a counterexample of one of the clauses ``open_`` (P, C) bool."""
        least = self.least.clamp(max=0)
        level = MARGIN * -least + torch.finfo(least.dtype).tiny
        room = up(level - self.least)
        reach = room.reshape(*room.shape, *[1] * (self.forms.ndim - 3)) / self.forms.abs()
        reach = up(reach.nan_to_num(torch.inf, torch.inf, -torch.inf))  # NaN: from a form that is not finite
        first, last = (end[:, None, None] for end in (box.lower, box.upper))
        upper = torch.where(self.forms > 0, torch.minimum(last, up(first + reach)), last).amin(2)
        lower = torch.where(self.forms < 0, torch.maximum(first, down(last - reach)), first).amax(2)
        left = open_ & (lower <= upper).flatten(2).all(2)
        outside = ~left.reshape(*left.shape, *[1] * (lower.ndim - 2))
        empty = ~left.any(1)
        whole = empty.reshape(-1, *[1] * (lower.ndim - 2))
        lower = torch.where(whole, box.lower, lower.masked_fill(outside, torch.inf).amin(1))
        upper = torch.where(whole, box.upper, upper.masked_fill(outside, -torch.inf).amax(1))
        same = ((lower == box.lower) & (upper == box.upper)).flatten(1).all(1) & ~empty
        cutting = open_.unsqueeze(2) & (self.least > -torch.inf)
        level = level.masked_fill(~cutting, torch.inf).flatten(1).amin(1).masked_fill(same, torch.inf)
        return Part(lower, upper, empty, level)


@dataclass(frozen=True, eq=False)
class Part:
    """The parts of P boxes that may hold a counterexample.

    Args:
        lower, upper: (P, *shape), ends within those of the box, rounded outward.
        empty: (P,) bool, the boxes of which nothing is left, whose ends are unchanged.
        level: (P,) > 0: outside the part each clause's largest row is at least as large; inf where the part is the box.
    """

    lower: Tensor
    upper: Tensor
    empty: Tensor
    level: Tensor


def rounded_down(minimum: Tensor, forms: Tensor, constants: Tensor, box: Box) -> Tensor:
    """Lower bounds (P, R) of the exact minima of linear forms (P, R, *shape) plus ``constants`` (P, R) over boxes, from
    minima computed in the forms' own dtype."""
    size = torch.maximum(box.lower.abs(), box.upper.abs()).flatten(1).unsqueeze(-1)
    flat = forms.flatten(2)
    magnitude = (flat.abs() @ size).squeeze(-1) + constants.abs()
    return minimum - 4 * (flat.shape[-1] + 4) * torch.finfo(forms.dtype).eps * magnitude


def up(x: Tensor) -> Tensor:
    """The next float: at least the exact result of the operation that was rounded to ``x``."""
    return torch.nextafter(x, x.new_tensor(torch.inf))


def down(x: Tensor) -> Tensor:
    return torch.nextafter(x, x.new_tensor(-torch.inf))
