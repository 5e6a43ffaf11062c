# Triton bodies: their pointers have no types, and an annotation would change what is compiled.
# pyright: basic
"""One backward step of linear relaxation, which reads and writes each coefficient once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ACCUMULATORS, PROGRAMS, accumulator, launch, wide

BLOCK = 1024
"""Neurons per program."""


@triton.jit
def _forward(
    coefficients, lower_slope, upper_slope, upper_intercept, through, constants, forms, neurons, parts, blocks_per_part,
    LOWS: tl.constexpr, UPS: tl.constexpr, INTERCEPTS: tl.constexpr, UPPER: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One part of one form. LOWS, UPS, INTERCEPTS: whether those lines are per form, or shared by an image's forms."""
    item, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    image = item // forms
    total = tl.zeros([BLOCK], ACC)
    for step in range(blocks_per_part):
        n = (part * blocks_per_part + step) * BLOCK + tl.arange(0, BLOCK)
        inside = n < neurons
        a = wide(tl.load(coefficients + item * neurons + n, inside, 0.0))
        low = wide(tl.load(lower_slope + (item if LOWS else image) * neurons + n, inside, 0.0))
        up = wide(tl.load(upper_slope + (item if UPS else image) * neurons + n, inside, 0.0))
        intercept = wide(tl.load(upper_intercept + (item if INTERCEPTS else image) * neurons + n, inside, 0.0))
        below = a <= 0 if UPPER else a >= 0
        tl.store(through + item * neurons + n, a * tl.where(below, low, up), inside)
        total += tl.where(below, 0.0, a * intercept)
    tl.store(constants + item * parts + part, tl.sum(total, 0))


@triton.jit
def _backward(
    grad, grad_bias, coefficients, lower_slope, upper_slope, upper_intercept,
    to_coefficients, to_lower, to_upper, to_intercept, forms, neurons, blocks, parts, forms_per_part,
    LOWS: tl.constexpr, UPS: tl.constexpr, INTERCEPTS: tl.constexpr, UPPER: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A block of neurons and one part of an image's forms; the gradients of shared lines are (B, parts, N)."""
    item = tl.program_id(0).to(tl.int64)
    image, part = item // (blocks * parts), item // blocks % parts
    n = item % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = n < neurons
    lows, ups, intercepts = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for form in range(part * forms_per_part, tl.minimum(part * forms_per_part + forms_per_part, forms)):
        row = image * forms + form
        at = row * neurons + n
        a, g = wide(tl.load(coefficients + at, inside, 0.0)), wide(tl.load(grad + at, inside, 0.0))
        h = wide(tl.load(grad_bias + row))
        low = wide(tl.load(lower_slope + (row if LOWS else image) * neurons + n, inside, 0.0))
        up = wide(tl.load(upper_slope + (row if UPS else image) * neurons + n, inside, 0.0))
        intercept = wide(tl.load(upper_intercept + (row if INTERCEPTS else image) * neurons + n, inside, 0.0))
        below = a <= 0 if UPPER else a >= 0
        tl.store(to_coefficients + at, tl.where(below, low * g, up * g + intercept * h), inside)
        onto_low, onto_up = tl.where(below, a * g, 0.0), tl.where(below, 0.0, a * g)
        onto_intercept = tl.where(below, 0.0, a * h)
        if LOWS:
            tl.store(to_lower + at, onto_low, inside)
        if UPS:
            tl.store(to_upper + at, onto_up, inside)
        if INTERCEPTS:
            tl.store(to_intercept + at, onto_intercept, inside)
        lows, ups, intercepts = lows + onto_low, ups + onto_up, intercepts + onto_intercept
    shared = (image * parts + part) * neurons + n
    if not LOWS:
        tl.store(to_lower + shared, lows, inside)
    if not UPS:
        tl.store(to_upper + shared, ups, inside)
    if not INTERCEPTS:
        tl.store(to_intercept + shared, intercepts, inside)


def crown(
    coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor, upper_intercept: Tensor, upper: bool
) -> tuple[Tensor, Tensor]:
    batch, forms, neurons = coefficients.shape
    acc, blocks = accumulator(coefficients.dtype), triton.cdiv(neurons, BLOCK)
    parts = max(1, min(blocks, PROGRAMS // max(batch * forms, 1)))
    through = torch.empty_like(coefficients)
    constants = coefficients.new_empty(batch, forms, parts, dtype=acc)
    launch(
        _forward, batch * forms * parts, coefficients, coefficients, lower_slope, upper_slope, upper_intercept,
        through, constants, forms, neurons, parts, triton.cdiv(blocks, parts),
        **_own((lower_slope, upper_slope, upper_intercept)), UPPER=upper, BLOCK=BLOCK, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    return through, constants.sum(-1).to(coefficients.dtype)


def crown_backward(
    grad: Tensor, grad_bias: Tensor, coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor,
    upper_intercept: Tensor, upper: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, forms, neurons = coefficients.shape
    lines = (lower_slope, upper_slope, upper_intercept)
    acc, block = accumulator(coefficients.dtype), BLOCK // 4
    blocks = triton.cdiv(neurons, block)
    parts = max(1, min(forms, PROGRAMS // max(batch * blocks, 1)))
    own = _own(lines)
    results = [
        torch.empty_like(line) if of_form else line.new_empty(batch, parts, neurons, dtype=acc)
        for line, of_form in zip(lines, own.values(), strict=True)
    ]
    through = torch.empty_like(coefficients)
    launch(
        _backward, batch * blocks * parts, coefficients, grad, grad_bias, coefficients, *lines, through, *results,
        forms, neurons, blocks, parts, triton.cdiv(forms, parts), **own, UPPER=upper, BLOCK=block,
        ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    onto_lower, onto_upper, onto_intercept = (
        result if of_form else result.sum(1, keepdim=True).to(coefficients.dtype)
        for result, of_form in zip(results, own.values(), strict=True)
    )
    return through, onto_lower, onto_upper, onto_intercept


def _own(lines: Sequence[Tensor]) -> dict[str, bool]:
    """Which lines are per form; with a single form there is no difference."""
    return {name: line.shape[1] > 1 for name, line in zip(("LOWS", "UPS", "INTERCEPTS"), lines, strict=True)}
