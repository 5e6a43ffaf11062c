"""The formulas in plain torch: the oracle of every compiled backend, and the fallback.

Functions have the public ops' signatures, no checks, and torch's own gradients. ``backend`` holds the functions that
ops call when this backend is chosen.
"""

from .cutting import cut_box_minima
from .interval import batch_statistics_norm, ibp_affine, ibp_conv2d, ibp_linear, ibp_margins, ibp_relu
from .relaxation import crown_relu_step
from .sparse import sparse_apply, spgd_step, topk_mask

__all__ = [
    "batch_statistics_norm", "crown_relu_step", "cut_box_minima", "ibp_affine", "ibp_conv2d", "ibp_linear",
    "ibp_margins", "ibp_relu", "sparse_apply", "spgd_step", "topk_mask",
]  # fmt: skip
