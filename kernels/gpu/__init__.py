"""The Triton backend: CUDA from compute capability 8.0, with the functions of ``reference/backend.py``."""

from .cutting import cut_box_minima
from .elementwise import pointwise, pointwise_backward
from .elision import margins, margins_backward
from .norm import batch_norm, batch_norm_backward
from .relaxation import crown, crown_backward
from .selection import sparse_apply, topk_mask
from .step import spgd_step

__all__ = [
    "batch_norm", "batch_norm_backward", "crown", "crown_backward", "cut_box_minima", "margins", "margins_backward",
    "pointwise", "pointwise_backward", "sparse_apply", "spgd_step", "topk_mask",
]  # fmt: skip
