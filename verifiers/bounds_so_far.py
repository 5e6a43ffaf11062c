"""What earlier stages have learned about a batch of problems, handed from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bounds import Bounds, Region
from ..bounds.network import Network
from .optimise import finite
from .problem import Problem, Specification


@dataclass(frozen=True)
class BoundsSoFar:
    """Facts about B problems of one network.

    Args:
        network: its folded form, in the precision that bounds are computed in.
        rows: (B, R) the best lower bounds of the specification's rows so far, offsets included.
        bounds: of every non-linear operation's input, by its position; empty before a stage computed them.
        alphas: (B, R, N) slopes that a stage found good; None before.
    """

    network: Network
    rows: Tensor
    bounds: dict[int, Bounds]
    alphas: Tensor | None = None

    def subset(self, index: Tensor) -> BoundsSoFar:
        bounds = {place: Bounds(found.lower[index], found.upper[index]) for place, found in self.bounds.items()}
        alphas = None if self.alphas is None else self.alphas[index]
        return BoundsSoFar(self.network, self.rows[index], bounds, alphas)

    def region_of(self, problem: Problem) -> Region:
        """The problems' regions in the precision that bounds are computed in."""
        return problem.region.to(self.rows.dtype)

    def rows_of(self, specification: Specification) -> tuple[Tensor, Tensor]:
        """Rows and offsets in that precision."""
        return specification.rows.to(self.rows.dtype), specification.offsets.to(self.rows.dtype)

    def with_rows(self, rows: Tensor) -> BoundsSoFar:
        """With further lower bounds of the rows: the better ones are kept. One that is not finite proves nothing."""
        return replace(self, rows=torch.maximum(self.rows, finite(rows).to(self.rows.dtype)))

    def with_bounds(self, bounds: dict[int, Bounds]) -> BoundsSoFar:
        merged = {place: self.bounds[place].intersect(b) if self.bounds else b for place, b in bounds.items()}
        return replace(self, bounds=merged)
