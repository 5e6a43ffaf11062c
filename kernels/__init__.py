"""Fused bound kernels on tensors, useful on their own: interval arithmetic, linear relaxation, sparse projection.

Depends on torch only; numba and Triton are imported at their first use. An interval is a pair (center, radius) of equal
shape, dtype and device with radius >= 0. Ops accept any strides and empty batches. Bounds hold up to rounding in the
dtype's round-to-nearest arithmetic: rounding errors are not added to the radius.
Installed as ``certtrain.kernels``.
"""

if __name__ == "kernels":  # imported by its folder's name in a checkout: hand over to the one real module
    from certtrain._alias import hand_over

    hand_over("kernels")
else:
    from . import reference
    from .checks import check_values
    from .convolution import ibp_conv2d
    from .cutting import cut_box_minima
    from .dispatch import available_backends, use_backend
    from .linear import ibp_linear
    from .margins import ibp_margins
    from .pointwise import batch_statistics_norm, ibp_affine, ibp_relu
    from .relaxation import crown_relu_step
    from .sparse import sparse_apply, spgd_step, topk_mask

    __all__ = [
        "available_backends", "batch_statistics_norm", "check_values", "crown_relu_step", "cut_box_minima",
        "ibp_affine", "ibp_conv2d", "ibp_linear", "ibp_margins", "ibp_relu", "reference", "sparse_apply", "spgd_step",
        "topk_mask", "use_backend",
    ]  # fmt: skip
