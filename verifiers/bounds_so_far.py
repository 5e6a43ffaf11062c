"""Bounds that earlier stages computed for a batch of problems, handed from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bounds import Bounds, Region
from ..bounds.network import Network
from ..bounds.output_forms import OutputForms
from .optimise import finite
from .problem import Problem, Specification
from .search_record import SearchRecord


@dataclass(frozen=True)
class BoundsSoFar:
    """The best bounds so far for B problems on one network.

    Args:
        network: the folded network, in the precision that bounds are computed in.
        rows: (B, R) lower bounds of the specification's rows, offsets included.
        bounds: bounds of the input of every non-linear operation, by its position; empty until a stage computes them.
        alphas: (B, R, N) slopes of the lower lines, to start from; None until a stage optimises them.
        record: for proofs, the last search's record, with the problems' positions in that search; empty before. Then
            ``alphas`` are those of the best bounds. None where no proofs are wanted.
    """

    network: Network
    rows: Tensor
    bounds: dict[int, Bounds]
    alphas: Tensor | None = None
    record: SearchRecord | None = None

    def subset(self, index: Tensor) -> BoundsSoFar:
        bounds = {place: Bounds(ends.lower[index], ends.upper[index]) for place, ends in self.bounds.items()}
        alphas = None if self.alphas is None else self.alphas[index]
        return BoundsSoFar(self.network, self.rows[index], bounds, alphas, self.record)

    def region_of(self, problem: Problem) -> Region:
        """The problems' regions in the precision that bounds are computed in."""
        return problem.region.to(self.rows.dtype)

    def forms_of(self, specification: Specification) -> tuple[OutputForms, Tensor]:
        """The specification's rows and offsets, in the precision that bounds are computed in."""
        return specification.forms.to(self.rows.dtype), specification.offsets.to(self.rows.dtype)

    def rows_of(self, specification: Specification) -> tuple[Tensor, Tensor]:
        """``forms_of`` with dense rows (B, R, K): for the part of a specification that fits into memory."""
        forms, offsets = self.forms_of(specification)
        return forms.dense(), offsets

    def with_rows(self, rows: Tensor) -> BoundsSoFar:
        """Merge further lower bounds (B, R) of the rows: the larger ones are kept; values that are not finite are
        ignored."""
        return replace(self, rows=torch.maximum(self.rows, finite(rows).to(self.rows.dtype)))

    def with_bounds(self, bounds: dict[int, Bounds]) -> BoundsSoFar:
        """Intersect with further bounds of the non-linear operations' inputs."""
        merged = {
            place: self.bounds[place].intersect(b).uncrossed() if self.bounds else b for place, b in bounds.items()
        }
        return replace(self, bounds=merged)
