"""Bounds of a specification over many small boxes of few inputs, each by the cheapest method that may suffice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds import Bounds, Box, Region
from ..bounds.crown import LinearBound, backward_rows, crown_bounds, relax_all, slack_of
from ..bounds.forward_linear import forward_bounds
from ..bounds.network import Network
from ..bounds.output_forms import OutputForms
from .clipping import Cuts, rounded_down
from .neurons import Columns, Neurons
from .optimise import ascents_at_a_time, finite, with_offsets
from .tighter_bounds import tightened, tightening_work, work_of_a_row

AFFORDABLE = 30
"""Unstable neurons, for each input that varies, with which backward passes are always made. On ACAS Xu they pay well
below this; on networks of thousands of neurons and two inputs forward bounds are a hundred times cheaper."""

ROOT_STEPS = 3
"""Steps of the ascents that tighten the bounds of all neurons over a whole set once. On VNN-COMP's cifar_biasfield,
property 4, they raise the worst row from -23.7 to -9.5 in the time of eight boxes."""

TIGHTENING = 0.25
"""Share of the ascents' work that passes to many neurons take before them. Properties 0, 1, 2, 3 and 5 need no more
than eight boxes; property 7 took 86 s when the ascents came after as much work as theirs, 74 s so."""

WEIGHINGS = 20
"""Number of steps that optimise the weights of a clause's rows."""


@dataclass(frozen=True, eq=False)
class ClauseBounds:
    """Lower bounds of each clause's largest row over P boxes.

    Args:
        clauses: (P, C) the bounds.
        forms: (P, C, *shape) linear forms of the input whose minima they are, constants left out.
        weights: (P, C, G) weights of the clause's rows in the forms, which add up to 1.
        cuts: linear bounds of each clause's rows, and of the mean with the best weights.
    """

    clauses: Tensor
    forms: Tensor
    weights: Tensor
    cuts: Cuts


class BoxBounds:
    """Bounds the clauses of B problems over boxes within their sets.

    Args:
        rows: (B, R, K) linear forms of the logits; offsets: (B, R), added to them.
        members: (C, G) int64, the row numbers of each clause.
        outer: bounds of every non-linear operation's input over each problem's whole set, by position; may be empty.
        region: the B whole sets, for which backward passes to many neurons are not made again.
        tighten: whether ``outer`` may be tightened by slopes that no record holds.
    """

    def __init__(
        self, network: Network, rows: Tensor | OutputForms, offsets: Tensor, members: Tensor, outer: dict[int, Bounds],
        region: Region, tighten: bool = False,
    ):  # fmt: skip
        self.network, self.rows, self.offsets, self.members = network, OutputForms.of(rows), offsets, members
        self.outer = dict(outer)
        self.region, self.lower, self.upper = region, region.hull.lower, region.hull.upper
        self._column = work_of_a_row(network, len(network.operations) - 1)
        self._row = {
            number: sum(work_of_a_row(network, read) for read in network.operations[number].inputs)
            for number in network.nonlinear
        }
        self._spent = torch.zeros(len(offsets), dtype=torch.float64, device=offsets.device)
        self._enough = torch.full_like(self._spent, torch.inf)
        if tighten and outer and network.piecewise_linear and network.rounding is None:
            self._enough = TIGHTENING * tightening_work(network, outer, ROOT_STEPS)

    def __call__(self, box: Box, image: Tensor) -> ClauseBounds:
        """Bounds over P boxes within the sets of the problems ``image`` (P,)."""
        self._tighten()
        outer = {place: Bounds(ends.lower[image], ends.upper[image]) for place, ends in self.outer.items()}
        if self.network.rounding is not None:  # forward bounds do not cover rounding
            return self._clauses(box, image, crown_bounds(self.network, box, outer))
        bounds = forward_bounds(self.network, box, outer)
        found = self._clauses(box, image, bounds)
        again = self._chosen(~(found.clauses > 0).all(1), box, image, bounds).nonzero().flatten()
        if not len(again):
            return found
        some = {place: Bounds(ends.lower[again], ends.upper[again]) for place, ends in bounds.items()}
        some = crown_bounds(self.network, box.take(again), some)
        by_crown = self._clauses(box.take(again), image[again], some)
        better = by_crown.clauses > found.clauses[again]
        clauses, forms, weights = found.clauses.clone(), found.forms.clone(), found.weights.clone()
        clauses[again] = torch.where(better, by_crown.clauses, clauses[again])
        weights[again] = torch.where(better.unsqueeze(-1), by_crown.weights, weights[again])
        forms[again] = by_crown.forms
        return ClauseBounds(clauses, forms, weights, found.cuts.replaced(again, by_crown.cuts))

    def _tighten(self) -> None:
        """Tighten ``outer`` for the problems whose passes to many neurons have taken enough work."""
        due = (self._spent >= self._enough).nonzero().flatten()
        if not len(due):
            return
        neurons = Neurons.of(self.network)
        for part in torch.split(due, max(1, ascents_at_a_time(self.network, 2, self.offsets))):
            some = {place: Bounds(ends.lower[part], ends.upper[part]) for place, ends in self.outer.items()}
            low, up = neurons.ends(some, self.offsets[part])
            columns = Columns.of(neurons, (low < 0) & (up > 0))
            tighter, _ = tightened(self.network, self.region.take(part), some, columns, ROOT_STEPS)
            for place, ends in tighter.items():
                lower, upper = self.outer[place].lower, self.outer[place].upper
                self.outer[place] = Bounds(lower.index_copy(0, part, ends.lower), upper.index_copy(0, part, ends.upper))
        self._enough[due] = torch.inf

    def _chosen(self, open_: Tensor, box: Box, image: Tensor, bounds: dict[int, Bounds]) -> Tensor:
        """(P,) bool, the boxes ``open_`` for which backward passes to the neurons behind the first layer are made: few
        of these are unstable, or the passes take less work than forward bounds of the parts that halving at every
        input gives."""
        wide = (box.hull.radius > 0).flatten(1).sum(1)
        count, passes = torch.zeros_like(wide), torch.zeros_like(wide, dtype=torch.float64)
        for place in sorted(bounds)[1:]:
            parts = self.network.split_bounds(place, bounds[place])
            open_of = self.network.nonlinear_at(place).unstable(*parts)
            unstable = torch.cat([part.flatten(1) for part in open_of], 1).sum(1)
            count, passes = count + unstable, passes + 2 * self._row[place] * unstable
        few = count <= AFFORDABLE * (1 + wide)
        many = open_ & ~few & (passes < 2.0**wide * (1 + wide) * self._column)
        if self.outer:
            many &= ((box.lower > self.lower[image]) | (box.upper < self.upper[image])).flatten(1).any(1)
        self._spent.index_add_(0, image, passes * many)
        return open_ & few | many

    def _clauses(self, box: Box, image: Tensor, bounds: dict[int, Bounds]) -> ClauseBounds:
        offsets = self.offsets[image]
        lines, slack = relax_all(self.network, bounds), slack_of(self.network, box, bounds)
        linear = backward_rows(self.network, self.rows.take(image), offsets, lines, slack)
        values = finite(with_offsets(self.network, linear.lower(box), offsets))
        best, row = values[:, self.members].max(-1)
        forms = linear.forms[:, self.members]  # (P, C, G, *shape)
        own_row = (torch.arange(self.members.shape[1], device=row.device) == row.unsqueeze(-1)).to(best.dtype)
        least = values
        if linear.slack is None:
            least = rounded_down(values, linear.forms, linear.constants.abs() + offsets.abs(), box)
        cuts = Cuts(forms, least[:, self.members])
        single = ClauseBounds(best, _picked(forms, row), own_row, cuts)
        if self.members.shape[1] > 1 and linear.slack is None:  # a mean's own rounding is not in the slack
            return self._weighed(box, linear, forms, offsets, single)
        return single

    def _weighed(
        self, box: Box, linear: LinearBound, forms: Tensor, offsets: Tensor, single: ClauseBounds
    ) -> ClauseBounds:
        """Replace bounds by single rows with those of a weighted mean of the clause's rows where these are higher."""
        constants = (linear.constants + offsets)[:, self.members]
        weights, bounds = best_weights(box, forms, constants)
        mean = (weights.reshape(*weights.shape, *[1] * (forms.ndim - 3)) * forms).sum(2)
        better = bounds > single.clauses
        clauses = torch.where(better, bounds, single.clauses)
        sizes = (weights * (linear.constants.abs() + offsets.abs())[:, self.members]).sum(-1)
        cut = Cuts(mean.unsqueeze(2), rounded_down(bounds, mean, 2 * sizes, box).unsqueeze(2))
        return ClauseBounds(
            clauses,
            torch.where(better.reshape(*better.shape, *[1] * (mean.ndim - 2)), mean, single.forms),
            torch.where(better.unsqueeze(-1), weights, single.weights),
            single.cuts.joined(cut),
        )


def best_weights(region: Region, forms: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, bounds): weights (P, C, G) of a clause's rows, and the minimum (P, C) of the weighted mean over boxes.

    Row g is bounded below by forms (P, C, G, *shape) · x + constants (P, C, G); the largest row is at least every
    weighted mean. The weights are found by multiplicative updates towards the rows that are largest where the mean is
    smallest; every iterate is a valid bound.
    """
    center, radius = (part.flatten(1)[:, None, None] for part in (region.hull.center, region.hull.radius))
    flat, weights = forms.flatten(3), torch.full_like(constants, 1 / constants.shape[-1])
    best, kept = torch.full_like(constants[..., 0], -torch.inf), weights
    for _ in range(WEIGHINGS):
        mean = (weights.unsqueeze(-1) * flat).sum(2, keepdim=True)
        rows = (flat * (center - radius * mean.sign())).sum(-1) + constants
        bounds = finite((weights * rows).sum(-1))
        better = bounds > best
        best, kept = torch.where(better, bounds, best), torch.where(better.unsqueeze(-1), weights, kept)
        weights = weights * (rows / rows.abs().amax(-1, keepdim=True).clamp(min=1e-30)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
    return kept, best


def _picked(forms: Tensor, row: Tensor) -> Tensor:
    """(P, C, *shape): entry ``row`` (P, C) of each clause's forms (P, C, G, *shape)."""
    index = row.reshape(*row.shape, 1, *[1] * (forms.ndim - 3)).expand(-1, -1, 1, *forms.shape[3:])
    return forms.gather(2, index).squeeze(2)
