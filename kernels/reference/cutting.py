"""Linear forms over a box that is cut by a half-space: bounds by the Lagrangian dual.

The dual of a form is concave in its multiplier t >= 0. Its maximum is looked for near |form|_1 / |cut|_1, where both
weigh the same: first at four multiples of it, then at four points between the neighbours of the best.
"""

import torch
from torch import Tensor

FIRST = (0.125, 0.375, 1.0, 2.5)
"""Multiples of |form|_1 / |cut|_1 that are tried first. On children of branch and bound (networks of VNN-COMP) about
0.5 is best on average."""

LAST = 8.0
"""Multiple of |form|_1 / |cut|_1 up to which the maximum is looked for."""


def cut_box_minima(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    found = constants.new_full(rows.shape, -torch.inf)
    for item, cut in enumerate(cuts):
        chosen = rows[item] >= 0
        own = rows[item][chosen]
        found[item, chosen] = constants[own] + _minima(forms[own], cut, offsets[item])
    return found.nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def _minima(forms: Tensor, cut: Tensor, offset: Tensor) -> Tensor:
    sizes = forms.abs().sum(1)
    unit = sizes / cut.abs().sum()  # not finite without a cut: nothing is gained

    def dual(multiple: Tensor) -> Tensor:
        t = unit * multiple
        value = t * offset - (forms + t.unsqueeze(1) * cut).abs().sum(1)
        return value.nan_to_num(-torch.inf, -torch.inf, -torch.inf)

    multiples = torch.tensor([0.0, *FIRST, LAST], dtype=forms.dtype, device=forms.device)
    best, at = torch.stack([-sizes, *(dual(m) for m in multiples[1:-1])]).max(0)
    low, high = multiples[(at - 1).clamp(min=0)], multiples[at + 1]
    second = torch.stack([dual(low + (high - low) * part / 5) for part in (1, 2, 3, 4)]).amax(0)
    return torch.where(at > 0, torch.maximum(best, second), best)
