"""Linear forms over a box that is cut by a half-space."""

import torch
from torch import Tensor

from . import checks
from .dispatch import backend_for
from .registration import register


def cut_box_minima(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """Lower bounds of linear forms over cut unit boxes, by their Lagrangian duals (Clip-and-Verify, arXiv 2512.11087).

    For item p and form j = rows[p, k], a lower bound of

        min forms[j] · z + constants[j]  over  |z_i| <= 1, cuts[p] · z + offsets[p] <= 0

    which is max over t >= 0 of constants[j] + t offsets[p] - |forms[j] + t cuts[p]|_1, concave in t. Every t gives a
    bound; up to eight are tried besides 0, so that none is below the minimum over the whole box. Of what the maximum
    gains over that, the bounds gain at least half if it lies at a t from 1/8 to 12 times |forms[j]|_1 / |cuts[p]|_1,
    possibly nothing at a smaller one, where little is gained; and 95 % in all of random forms. Where nothing is left of
    the box, any bound is sound. Backends may differ by more than rounding where two multipliers tie.

    Args:
        forms: (J, N), constants: (J,); cuts: (P, N), offsets: (P,); float32 or float64 (on GPU also half types).
        rows: (P, K) int64 from 0 to J - 1, or -1 for none.
    Returns:
        (P, K); -inf where ``rows`` has -1, where a form or constant is not finite, and instead of overflow. A cut or
        offset that is not finite is no cut. Sound up to rounding. Not differentiable.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the argument; rows out of range, on the
            CPU and under ``check_values``.
    """
    checks.floating("forms", forms)
    for name, values in (("forms", forms), ("cuts", cuts)):
        if values.ndim != 2:
            raise ValueError(f"{name}: found {values.ndim} dimensions; expected 2, one row per form")
    for name, values in (("constants", constants), ("cuts", cuts), ("offsets", offsets)):
        checks.same_as(name, values, forms, "forms")
    checks.shape("constants", constants, (len(forms),))
    checks.shape("cuts", cuts, (len(cuts), forms.shape[1]))
    checks.shape("offsets", offsets, (len(cuts),))
    checks.row_numbers("rows", rows, forms, len(cuts))
    return _minima(forms.detach(), constants.detach(), cuts.detach(), offsets.detach(), rows)


@torch.library.custom_op("certtrain::cut_box_minima", mutates_args=())
def _minima(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    checks.row_values("rows", rows, len(forms))
    tensors = [t.contiguous() for t in (forms, constants, cuts, offsets, rows)]
    return backend_for(forms).cut_box_minima(*tensors)


def _fake(forms: Tensor, constants: Tensor, cuts: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    return constants.new_empty(rows.shape)


register(_minima, fake=_fake)
