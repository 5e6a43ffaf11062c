"""Backward linear relaxation: CROWN (Zhang et al., arXiv 1811.00866; Xu et al., arXiv 2011.13824)."""

import torch
from torch import Tensor


def crown_relu_step(
    coefficients: Tensor, bias: Tensor, lower_slope: Tensor, upper_slope: Tensor, upper_intercept: Tensor,
    *, upper: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if lower_slope.ndim < coefficients.ndim:
        lower_slope = lower_slope.unsqueeze(1)
    if upper_slope.ndim < coefficients.ndim:
        upper_slope = upper_slope.unsqueeze(1)
    if upper_intercept.ndim < coefficients.ndim:
        upper_intercept = upper_intercept.unsqueeze(1)
    below = (coefficients <= 0) if upper else (coefficients >= 0)  # where the lower line gives the bound
    through = torch.where(below, coefficients * lower_slope, coefficients * upper_slope)
    constants = torch.where(below, 0, coefficients * upper_intercept)
    return through, bias + constants.flatten(2).sum(-1)
