"""Fused bound kernels: interval arithmetic on (center, radius) pairs of tensors, useful on their own.

Depends on torch alone and knows tensors, not networks. Installed as ``certtrain.kernels``.
"""

if __name__ == "kernels":  # imported by its folder's name in a checkout: hand over to the one real module
    from certtrain._alias import hand_over

    hand_over("kernels")
else:
    from .ops import batch_statistics_norm, ibp_affine, ibp_conv2d, ibp_linear, ibp_margins, ibp_relu

    __all__ = ["batch_statistics_norm", "ibp_affine", "ibp_conv2d", "ibp_linear", "ibp_margins", "ibp_relu"]
