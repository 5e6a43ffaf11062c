"""Clipping of the bounds of neurons' inputs to the part of a subproblem that may hold a counterexample.

After the domain clipping of Clip-and-Verify (arXiv 2512.11087). A linear lower bound of a clause's row over the inputs
is <= the row's value, so that at a counterexample, and wherever the row is below a level t > 0, the linear bound is
below t: this cuts a half-space out of the box of inputs. Over what is left, the linear bounds of the neurons' inputs
that were found once for the whole box have narrower ranges (``kernels.cut_box_minima``). Near the leaves of a search
what is left is a small corner: on networks of VNN-COMP a tenth to two tenths of the ranges, and dozens of unstable
neurons, go in each subproblem, for less work than a step of its ascent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bounds.interval import Interval
from ..kernels import cut_box_minima

LEVEL = 1e-3
"""Level t up to which rows are left in, relative to minus the bound: what is proved of the rest is proved of the whole
up to this level."""


@dataclass(frozen=True, eq=False)
class NeuronLines:
    """Linear bounds of C neurons' inputs over one box of N inputs center + radius z, with |z| <= 1.

    Args:
        forms, constants: (2C, N) and (2C,): forms · z + constants is a lower bound of a neuron's input, for the second
            half of the rows of minus its input.
        columns: (C,) int64, the neurons' columns.
    """

    forms: Tensor
    constants: Tensor
    columns: Tensor

    def clipped(
        self, cuts: Tensor, offsets: Tensor, lower: Tensor, upper: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(lower, upper): bounds (P, U) of the neurons' inputs, of all columns, where cuts · z + offsets <= 0. They
        may cross: then there is no such z.

        Args:
            cuts, offsets: (P, N) and (P,).
            lower, upper: (P, U) bounds known before.
            wanted: (P, U) bool, the neurons to clip, if they are unstable. With those alone whose upper lines a bound
                uses, half as many, a search of 19,000 subproblems had as many and took 24 in place of 27 s.
        """
        low, high = lower[:, self.columns], upper[:, self.columns]
        open_ = (low < 0) & (high > 0) & wanted[:, self.columns]
        most = int(open_.sum(1).max())
        chosen = torch.argsort(open_.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
        none = ~open_.gather(1, chosen)
        rows = torch.cat([chosen, chosen + len(self.columns)], 1).masked_fill(torch.cat([none, none], 1), -1)
        found, columns = cut_box_minima(self.forms, self.constants, cuts, offsets, rows), self.columns[chosen]
        below, above = found[:, :most], -found[:, most:]
        return lower.scatter_reduce(1, columns, below, "amax"), upper.scatter_reduce(1, columns, above, "amin")


def scaled(forms: Tensor, constants: Tensor, box: Interval) -> tuple[Tensor, Tensor]:
    """Linear forms (R, N) and constants (R,) of inputs as forms and constants of z, for inputs center + radius z."""
    center, radius = box.center.flatten(), box.radius.flatten()
    return forms * radius, constants + forms @ center
