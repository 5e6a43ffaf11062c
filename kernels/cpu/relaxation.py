"""One backward step of linear relaxation, which reads and writes each coefficient once."""

import numpy as np
import torch
from torch import Tensor

from .threads import Array, array, jit, run

BLOCK = 4096
"""Neurons per item of the backward pass, so that threads share even a single image's neurons."""


@jit(reassociate=True)
def _forward(
    first: int, last: int, coefficients: Array, lower_slope: Array, upper_slope: Array, upper_intercept: Array,
    upper: bool, through: Array, constants: Array, zero: float,
) -> None:  # fmt: skip
    """Items are the B·R forms of all images; lines are (B, R or 1, N)."""
    forms = coefficients.shape[1]
    for item in range(first, last):
        image, form = item // forms, item % forms
        a, out = coefficients[image, form], through[image, form]
        low = lower_slope[image, min(form, lower_slope.shape[1] - 1)]
        up = upper_slope[image, min(form, upper_slope.shape[1] - 1)]
        intercept = upper_intercept[image, min(form, upper_intercept.shape[1] - 1)]
        total = zero
        if upper:
            for n in range(a.shape[0]):
                below = a[n] <= zero
                out[n] = a[n] * (low[n] if below else up[n])
                total += zero if below else a[n] * intercept[n]
        else:
            for n in range(a.shape[0]):
                below = a[n] >= zero
                out[n] = a[n] * (low[n] if below else up[n])
                total += zero if below else a[n] * intercept[n]
        constants[image, form] = total


@jit
def _backward(
    first: int, last: int, block: int, grad: Array, grad_bias: Array, coefficients: Array, lower_slope: Array,
    upper_slope: Array, upper_intercept: Array, upper: bool, to_coefficients: Array, to_lower: Array, to_upper: Array,
    to_intercept: Array, zero: float,
) -> None:  # fmt: skip
    """Items are blocks of an image's neurons, so that one thread sums over all forms."""
    forms, blocks = coefficients.shape[1], (coefficients.shape[2] + block - 1) // block
    for item in range(first, last):
        image, start = item // blocks, item % blocks * block
        part = slice(start, start + block)
        for form in range(forms):
            one, two, three = (
                min(form, lower_slope.shape[1] - 1), min(form, upper_slope.shape[1] - 1),
                min(form, upper_intercept.shape[1] - 1),
            )  # fmt: skip
            a, g, h = coefficients[image, form, part], grad[image, form, part], grad_bias[image, form]
            low, up = lower_slope[image, one, part], upper_slope[image, two, part]
            intercept, out = upper_intercept[image, three, part], to_coefficients[image, form, part]
            onto_low, onto_up = to_lower[image, one, part], to_upper[image, two, part]
            onto_intercept = to_intercept[image, three, part]
            for n in range(a.shape[0]):
                below = a[n] <= zero if upper else a[n] >= zero
                out[n] = low[n] * g[n] if below else up[n] * g[n] + intercept[n] * h
                onto_low[n] += a[n] * g[n] if below else zero
                onto_up[n] += zero if below else a[n] * g[n]
                onto_intercept[n] += zero if below else a[n] * h


def crown(
    coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor, upper_intercept: Tensor, upper: bool
) -> tuple[Tensor, Tensor]:
    batch, forms, _ = coefficients.shape
    through, constants = torch.empty_like(coefficients), coefficients.new_zeros(batch, forms)
    inputs = [array(t, *t.shape) for t in (coefficients, lower_slope, upper_slope, upper_intercept)]
    outputs = [array(t, *t.shape) for t in (through, constants)]
    run(_forward, batch * forms, coefficients.numel() * 4, *inputs, upper, *outputs, _zero(coefficients))
    return through, constants


def crown_backward(
    grad: Tensor, grad_bias: Tensor, coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor,
    upper_intercept: Tensor, upper: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (coefficients, lower_slope, upper_slope, upper_intercept)
    onto_lower, onto_upper, onto_intercept = (torch.zeros_like(t) for t in inputs[1:])
    outputs = torch.empty_like(coefficients), onto_lower, onto_upper, onto_intercept
    blocks = len(coefficients) * -(-coefficients.shape[2] // BLOCK)
    arrays = [array(t, *t.shape) for t in (grad, grad_bias, *inputs)]
    results = [array(t, *t.shape) for t in outputs]
    run(_backward, blocks, coefficients.numel() * 8, BLOCK, *arrays, upper, *results, _zero(coefficients))
    return outputs


def _zero(like: Tensor) -> np.floating:
    return np.float32(0) if like.dtype == torch.float32 else np.float64(0)
