"""Bounds of a specification over many small boxes of few inputs, as cheaply as each box allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import Bounds, Region
from ..bounds.crown import LinearBound, backward, crown_bounds, relax_all, slack_of
from ..bounds.forward_linear import forward_bounds
from ..bounds.network import Network
from .optimise import finite, with_offsets

AFFORDABLE = 30
"""Backward passes for open neurons are made where these are at most so many for each input that varies: on ACAS Xu
they are worth it long before, on networks of thousands of neurons and two inputs forward bounds are a hundred times
cheaper."""

WEIGHINGS = 20
"""Steps for the weights of a clause's rows."""


@dataclass(frozen=True, eq=False)
class ClauseBounds:
    """``clauses`` (P, C) lower bounds of each clause's largest row over P boxes; ``forms`` (P, C, *shape) of the inputs
    that gave them; ``weights`` (P, C, G) of the rows in each, which add up to 1."""

    clauses: Tensor
    forms: Tensor
    weights: Tensor


@dataclass(frozen=True)
class BoxBounds:
    """Bounds of linear forms ``rows`` (B, R, K), plus ``offsets`` (B, R), of the logits of B problems.

    Args:
        members: (C, G), the rows of each clause.
        outer: bounds of every non-linear operation's input over each problem's whole set; may be empty.
    """

    network: Network
    rows: Tensor
    offsets: Tensor
    members: Tensor
    outer: dict[int, Bounds]

    def __call__(self, region: Region, image: Tensor) -> ClauseBounds:
        """Bounds over P boxes within the sets of the problems ``image`` (P,)."""
        outer = {place: Bounds(found.lower[image], found.upper[image]) for place, found in self.outer.items()}
        if self.network.rounding is not None:  # forward lines know nothing of it
            return self._clauses(region, image, crown_bounds(self.network, region, outer))
        bounds = forward_bounds(self.network, region, outer)
        found = self._clauses(region, image, bounds)
        again = ~(found.clauses > 0).all(1) & self._affordable(region, bounds)
        if not again.any():
            return found
        some = {place: Bounds(of.lower[again], of.upper[again]) for place, of in bounds.items()}
        some = crown_bounds(self.network, region.take(again), some)
        steeper = self._clauses(region.take(again), image[again], some)
        better = steeper.clauses > found.clauses[again]
        clauses, forms, weights = found.clauses.clone(), found.forms.clone(), found.weights.clone()
        clauses[again] = torch.where(better, steeper.clauses, clauses[again])
        weights[again] = torch.where(better.unsqueeze(-1), steeper.weights, weights[again])
        forms[again] = steeper.forms
        return ClauseBounds(clauses, forms, weights)

    def _affordable(self, region: Region, bounds: dict[int, Bounds]) -> Tensor:
        """(P,) whether backward passes for all open neurons, but those of the first layer, may be made."""
        wide = (region.hull.radius > 0).flatten(1).sum(1)
        later = sorted(bounds)[1:]
        count = sum(((bounds[place].lower < 0) & (bounds[place].upper > 0)).flatten(1).sum(1) for place in later)
        return torch.as_tensor(count, device=wide.device) <= AFFORDABLE * (1 + wide)

    def _clauses(self, region: Region, image: Tensor, bounds: dict[int, Bounds]) -> ClauseBounds:
        linear = backward(
            self.network, len(self.network.operations) - 1, self.rows[image], relax_all(self.network, bounds),
            slack=slack_of(self.network, region, bounds),
        )  # fmt: skip
        values = finite(with_offsets(self.network, linear.lower(region), self.offsets[image]))
        best, row = values[:, self.members].max(-1)
        forms = linear.forms[:, self.members]  # (P, C, G, *shape)
        own_row = (torch.arange(self.members.shape[1], device=row.device) == row.unsqueeze(-1)).to(best.dtype)
        found = ClauseBounds(best, _picked(forms, row), own_row)
        if self.members.shape[1] > 1 and linear.slack is None:  # a mean's own rounding is not in the slack
            return self._weighed(region, linear, forms, self.offsets[image], found)
        return found

    def _weighed(
        self, region: Region, linear: LinearBound, forms: Tensor, offsets: Tensor, single: ClauseBounds
    ) -> ClauseBounds:
        """With the better bound that a weighted mean of a clause's rows may have."""
        constants = (linear.constants + offsets)[:, self.members]
        weights, bounds = best_weights(region, forms, constants)
        mean = (weights.reshape(*weights.shape, *[1] * (forms.ndim - 3)) * forms).sum(2)
        better = bounds > single.clauses
        return ClauseBounds(
            torch.where(better, bounds, single.clauses),
            torch.where(better.reshape(*better.shape, *[1] * (mean.ndim - 2)), mean, single.forms),
            torch.where(better.unsqueeze(-1), weights, single.weights),
        )


def best_weights(region: Region, forms: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (P, C, G) of rows that lie above lines, forms (P, C, G, *shape) · x + constants (P, C, G), and the bound
    (P, C) of their mean over boxes. The largest of the rows is above every weighted mean of them.

    Sought by multiplicative steps towards the rows that are largest where the mean is smallest.
    """
    center, radius = (part.flatten(1)[:, None, None] for part in (region.hull.center, region.hull.radius))
    flat, weights = forms.flatten(3), torch.full_like(constants, 1 / constants.shape[-1])
    best, kept = torch.full_like(constants[..., 0], -torch.inf), weights
    for _ in range(WEIGHINGS):
        mean = (weights.unsqueeze(-1) * flat).sum(2, keepdim=True)
        rows = (flat * (center - radius * mean.sign())).sum(-1) + constants
        found = finite((weights * rows).sum(-1))
        better = found > best
        best, kept = torch.where(better, found, best), torch.where(better.unsqueeze(-1), weights, kept)
        weights = weights * (rows / rows.abs().amax(-1, keepdim=True).clamp(min=1e-30)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
    return kept, best


def _picked(forms: Tensor, row: Tensor) -> Tensor:
    """(P, C, *shape) of (P, C, G, *shape)."""
    index = row.reshape(*row.shape, 1, *[1] * (forms.ndim - 3)).expand(-1, -1, 1, *forms.shape[3:])
    return forms.gather(2, index).squeeze(2)
