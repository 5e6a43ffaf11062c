"""The space of a search on signs: subproblems as assumed signs of unstable neurons, and the data that all share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bounds import memory
from ..bounds.interval import Interval
from ..bounds.network import Network
from ..typed import as_ints
from .bounds_so_far import BoundsSoFar
from .engine import OpenSubproblems
from .neuron_clipping import LEVEL, NeuronLines, scaled
from .neurons import Columns, Neurons
from .optimise import Subproblems, starting_slopes
from .problem import Problem, rows_of_clauses
from .reduced import Reduced, reduced
from .tighter_bounds import tightened

EMPTY = 1e-5
"""Relative to 1 + |bound|: where a neuron's bounds cross by more, the assumed signs are infeasible; less may be
rounding."""


@dataclass(frozen=True)
class SignSubproblems(OpenSubproblems):
    """Subproblems that store only the neurons which are open under their image's bounds, in U columns: unstable ones of
    piecewise linear operations, and those of others whose relaxation tighter bounds improve.

    Args:
        branch: (P,) int64, the column to split at next.
        signs: (P, U) int8, the assumed signs: 1, -1, or 0 for none. None is assumed of operations that are not
            piecewise linear.
        lower, upper: (P, U) bounds of the neurons' inputs.
        alphas, betas: (P, R, U) slopes and multipliers.
        level: (P,) > 0; signs and bounds hold where each row of the clause is below it, inf if they hold everywhere.
            No bound above it is claimed.
    """

    branch: Tensor
    signs: Tensor
    lower: Tensor
    upper: Tensor
    alphas: Tensor
    betas: Tensor
    level: Tensor


@dataclass(frozen=True)
class PackedSigns(OpenSubproblems):
    """Subproblems by their assumed signs alone.

    Args:
        branch: as in ``SignSubproblems``.
        decided: (P, D) int32, the columns with an assumed sign, counted from 1 and multiplied by the sign; 0 for none.
        level: as in ``SignSubproblems``.
    """

    branch: Tensor
    decided: Tensor
    level: Tensor


class SignSpace:
    """Data shared by all subproblems of a batch of problems: columns of open neurons, and rows of clauses."""

    def __init__(self, problem: Problem, known: BoundsSoFar):
        self.problem, self.network = problem, known.network
        self.region = known.region_of(problem)
        self.rows, self.offsets = known.forms_of(problem.specification)
        self.neurons = Neurons.of(known.network)
        self.lower, self.upper = self.neurons.ends(known.bounds, known.rows)  # (B, N)
        self.known = known
        open_ = self.neurons.open(known.network, known.bounds, known.rows)
        self.columns = Columns.of(self.neurons, open_)
        self.stable = tuple(torch.where(open_, 0.0, end) for end in (self.lower, self.upper))
        self.kinks = torch.cat([self.lower.new_zeros(0), *(
            self.lower.new_full((size,), self.network.nonlinear_at(place).kink)
            for place, size in zip(self.neurons.places, self.columns.sizes, strict=True)
        )])  # fmt: skip
        self.signed = torch.cat([self.lower.new_zeros(0, dtype=torch.bool), *(
            self.lower.new_full((size,), self.network.nonlinear_at(place).piecewise_linear, dtype=torch.bool)
            for place, size in zip(self.neurons.places, self.columns.sizes, strict=True)
        )])  # fmt: skip
        self.clauses, _ = rows_of_clauses(problem.specification.clauses)
        self.worst = known.rows[:, self.clauses].amax(-1)  # (B, clauses)
        self.lines = dict[int, NeuronLines]()  # by image
        self.reduced = dict[int, Reduced]()  # by image
        self.slopes = known.alphas  # (B, R, N) to start from; CROWN's if None

    def roots(self) -> PackedSigns:
        """The open clauses without assumed signs."""
        image, clause = (~(self.worst > 0)).nonzero(as_tuple=True)
        none = torch.zeros_like(image)
        decided = torch.zeros(len(image), 0, dtype=torch.int32, device=image.device)
        worst = self.worst[image, clause]
        return PackedSigns(image, clause, worst, none - 1, none, decided, torch.full_like(worst, torch.inf))

    def packed(self, some: SignSubproblems) -> PackedSigns:
        """The subproblems without bounds, slopes and multipliers of their own."""
        assumed = some.signs != 0
        most = int(assumed.sum(1).max()) if len(some) else 0
        columns = torch.argsort(assumed.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
        decided = (some.signs.gather(1, columns) * (columns + 1)).to(torch.int32)
        return PackedSigns(some.image, some.goal, some.bound, some.node, some.branch, decided, some.level)

    def restored(self, packed: PackedSigns) -> SignSubproblems:
        """The subproblems with their image's bounds, the slopes to start from, and no multipliers."""
        image, columns, rows = packed.image, self.columns.take(packed.image), self.clauses[packed.goal]
        lower, upper = (columns.gathered(end[image], 0.0) for end in (self.lower, self.upper))
        if self.slopes is None:
            alphas = starting_slopes(lower, upper, rows.shape[1])
        else:
            alphas = columns.gathered(self.slopes[image[:, None], rows], 0.0)
        signs = torch.zeros(len(image), columns.real.shape[1] + 1, dtype=torch.int8, device=image.device)
        signs.scatter_(1, packed.decided.abs().long(), packed.decided.sign().to(torch.int8))
        return SignSubproblems(
            image, packed.goal, packed.bound, packed.node, packed.branch, signs[:, 1:], lower, upper, alphas,
            torch.zeros_like(alphas), packed.level,
        )  # fmt: skip

    def tighten(self, images: Tensor, steps: int, clip: bool = True) -> None:
        """Tighten the bounds of the neurons of ``images`` (I,) by ascents of ``steps`` steps for each; ``clip`` keeps
        their linear bounds, for ``clipped``. One image after the other: some have many times others' neurons."""
        for image in torch.split(images, 1):
            known, region, columns = self.known.subset(image), self.region.take(image), self.columns.take(image)
            kept = sum(lines.forms.nbytes for lines in self.lines.values())
            room = memory.kept(self.lower) // 2 - kept if clip and region.is_box else 0
            bounds, lines = tightened(self.network, region, known.bounds, columns, steps, room=room)
            tighter = known.with_bounds(bounds).bounds
            self.lower[image], self.upper[image] = self.neurons.ends(tighter, known.rows)
            for own in lines:
                self.lines[int(image)] = own
            if self.network.rounding is None and self.network.piecewise_linear:
                room = memory.kept(self.lower) // 2 - sum(small.nbytes for small in self.reduced.values())
                small = reduced(self.network, region, tighter, columns, room)
                if small is not None:
                    self.reduced[int(image)] = small

    def networks(self, images: set[int]) -> list[Network]:
        """The networks over which subproblems of ``images`` are bounded; the whole one if there are none."""
        small = [self.reduced[image].network for image in images if image in self.reduced]
        return small if small and len(small) == len(images) else [*small, self.network]

    def release(self, open_: Tensor) -> None:
        """Free what was found for images, but those with open subproblems (P,)."""
        if not (self.lines or self.reduced):
            return
        still = set(as_ints(torch.bincount(open_).nonzero()))
        for found in (self.lines, self.reduced):
            for image in found.keys() - still:
                del found[image]

    def clamped(self, some: SignSubproblems) -> SignSubproblems:
        """The subproblems with bounds clamped to their image's bounds and to the assumed signs."""
        columns = self.columns.take(some.image)
        lower = torch.maximum(some.lower, columns.gathered(self.lower[some.image], 0.0))
        upper = torch.minimum(some.upper, columns.gathered(self.upper[some.image], 0.0))
        lower = torch.where(some.signs > 0, lower.clamp(min=0), lower)
        upper = torch.where(some.signs < 0, upper.clamp(max=0), upper)
        return replace(some, lower=lower, upper=upper)

    def clipped(self, some: SignSubproblems, forms: Tensor, constants: Tensor, used: Tensor) -> SignSubproblems:
        """Clip the bounds of the open subproblems' neurons to where a row of the clause may be below a small level.

        A neuron that becomes stable takes the sign as one assumed: so a leaf's linear program stays exact. Where
        nothing is left of a subproblem, its bound becomes the level.

        Args:
            forms, constants: (P, N) and (P,), a linear bound of a row of each subproblem's clause.
            used: (P, U) bool, the neurons whose upper lines that bound uses.
        """
        if not self.lines:
            return some
        open_ = ~(some.bound > 0)
        changed = {name: getattr(some, name).clone() for name in ("bound", "signs", "lower", "upper", "level")}
        for image, lines in self.lines.items():
            index = (open_ & (some.image == image)).nonzero().flatten()
            if len(index):
                hull = self.region.take(some.image[index[:1]]).hull
                tiny = torch.finfo(some.bound.dtype).tiny
                level = torch.minimum(some.level[index], (-LEVEL * some.bound[index]).clamp(min=tiny))
                cuts, offsets = scaled(forms[index], constants[index], Interval(hull.center[0], hull.radius[0]))
                wanted = used[index] & self.signed
                ends = lines.clipped(cuts, offsets - level, some.lower[index], some.upper[index], wanted)
                found = self._assumed(some.take(index), level, *ends)
                for name, values in changed.items():
                    values[index] = getattr(found, name)
        return replace(some, **changed)

    def _assumed(self, some: SignSubproblems, level: Tensor, lower: Tensor, upper: Tensor) -> SignSubproblems:
        """The subproblems with bounds that hold below ``level``, and may cross."""
        columns = self.columns.take(some.image)
        bound = torch.where(crossed(columns, lower, upper), level, some.bound)
        upper = torch.maximum(lower, upper)
        signs = self.signs_of(some, lower, upper)
        return replace(some, bound=bound, signs=signs, lower=lower, upper=upper, level=level)

    def signs_of(self, some: SignSubproblems, lower: Tensor, upper: Tensor) -> Tensor:
        """(P, U) the assumed signs, and those of the neurons that new bounds make stable."""
        signs = torch.where((lower >= 0) & (some.lower < 0), 1, torch.where((upper <= 0) & (some.upper > 0), -1, 0))
        new = (some.signs == 0) & self.columns.take(some.image).real & self.signed
        return torch.where(new, signs.to(some.signs.dtype), some.signs)

    def undecided(self, some: SignSubproblems) -> Tensor:
        """(P, U) bool, the unstable neurons that may be split."""
        real = self.columns.take(some.image).real
        return (some.lower < 0) & (some.upper > 0) & self.signed & real

    def linear(self, some: SignSubproblems) -> Subproblems:
        """The subproblems in all neurons, as ``maximise`` takes them."""
        columns, at = self.columns.take(some.image), (some.image[:, None], self.clauses[some.goal])
        lower, upper = (
            columns.added(whole[some.image], part)
            for whole, part in zip(self.stable, (some.lower, some.upper), strict=True)
        )
        signs = columns.added(torch.zeros_like(lower, dtype=torch.int8), some.signs)
        return Subproblems(self.region.take(some.image), self.rows[at], self.offsets[at], lower, upper, signs)


def crossed(columns: Columns, lower: Tensor, upper: Tensor) -> Tensor:
    """(P,) bool, where bounds (P, U) of a neuron's input cross by more than rounding errors."""
    return (columns.real & (lower - upper > EMPTY * (1 + lower.abs()))).any(1)
