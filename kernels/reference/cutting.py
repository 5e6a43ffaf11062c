"""Linear forms over a box that is cut by a half-space: bounds by the Lagrangian dual.

The dual of a form is concave in its multiplier t >= 0. Its maximum is looked for near |form| / |cut|, where both weigh
the same: first at four multiples of it, then at four points between the neighbours of the best.
"""

import torch
from torch import Tensor

FIRST = (0.125, 0.375, 1.0, 2.5)
"""Multiples of |form| / |cut| that are tried first. On children of branch and bound (networks of VNN-COMP) about 0.5
is best on average."""

LAST = 8.0
"""Multiple of |form| / |cut| up to which the maximum is looked for."""


def cut_box_minima(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    found = constants.new_full(rows.shape, -torch.inf)
    for item, cut in enumerate(cuts):
        chosen = rows[item] >= 0
        own = rows[item][chosen]
        found[item, chosen] = _minima(forms[own], constants[own], cut, offsets[item])
    return found


def _minima(forms: Tensor, constants: Tensor, cut: Tensor, offset: Tensor) -> Tensor:
    sizes = forms.abs().sum(1)
    unit = sizes / cut.abs().sum()  # not finite without a cut: nothing is gained

    def dual(multiple: Tensor) -> Tensor:
        t = unit * multiple
        return constants + t * offset - (forms + t.unsqueeze(1) * cut).abs().sum(1)

    multiples = torch.tensor([0.0, *FIRST, LAST], dtype=forms.dtype, device=forms.device)
    first = torch.stack([constants - sizes, *(dual(m.expand_as(unit)) for m in multiples[1:-1])])
    best, at = first.nan_to_num(-torch.inf).max(0)
    low, high = multiples[(at - 1).clamp(min=0)], multiples[at + 1]
    second = torch.stack([dual(low + (high - low) * part / 5) for part in (1, 2, 3, 4)])
    second = torch.where(at > 0, second.nan_to_num(-torch.inf).amax(0), -torch.inf)
    return torch.maximum(torch.where(sizes.isfinite(), best, -torch.inf), second)
