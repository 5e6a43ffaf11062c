"""The inner step of CROWN: backward linear relaxation through an activation layer."""

from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import backend_for
from .registration import formula_is_faster, plain, register


def crown_relu_step(
    coefficients: Tensor, bias: Tensor, lower_slope: Tensor, upper_slope: Tensor, upper_intercept: Tensor,
    *, upper: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Carry linear bounds of the outputs backward through ReLUs (CROWN, arXiv 1811.00866; alpha-CROWN, 2011.13824).

    Each neuron lies between two lines: ``lower_slope * x <= relu(x) <= upper_slope * x + upper_intercept``. A lower
    bound uses the lower line where its coefficient is positive and the upper line where it is negative; an upper bound
    vice versa. LeakyReLU has lines of the same form.

    Args:
        coefficients: (B, R, *shape), R linear forms of the neurons' outputs for each image; float32 or float64.
        bias: (B, R), their constants.
        lower_slope, upper_slope, upper_intercept: (B, *shape), or (B, R, *shape) with lines per form.
        upper: whether the forms are upper bounds.
    Returns:
        (coefficients, bias) of the forms before the layer. Sound, up to rounding, if the lines are.
        Differentiable once in every tensor (a coefficient of 0 counts as positive for a lower bound, as negative for
        an upper one); a second derivative raises.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, naming the argument.
    """
    checks.floating("coefficients", coefficients)
    if coefficients.ndim < 3:
        raise ValueError(f"coefficients: found {coefficients.ndim} dimensions; expected (B, R, *shape)")
    checks.same_as("bias", bias, coefficients, "coefficients")
    checks.shape("bias", bias, tuple(coefficients.shape[:2]))
    lines = [
        _rows(name, line, coefficients)
        for name, line in (
            ("lower_slope", lower_slope), ("upper_slope", upper_slope), ("upper_intercept", upper_intercept)
        )
    ]  # fmt: skip
    if formula_is_faster(coefficients, coefficients.numel()):
        through, bias = plain(reference.crown_relu_step, coefficients.flatten(2), bias, *lines, upper=upper)
    else:
        through, constant = _crown(coefficients.flatten(2), *lines, upper)
        bias = bias + constant
    return through.reshape(coefficients.shape), bias


def _rows(name: str, line: Tensor, coefficients: Tensor) -> Tensor:
    """A line as (B, 1 or R, N)."""
    checks.same_as(name, line, coefficients, "coefficients")
    batch, _, *rest = coefficients.shape
    if line.shape == coefficients.shape:
        return line.flatten(2)
    if line.shape != (batch, *rest):
        raise ValueError(
            f"{name}: found shape {tuple(line.shape)}; expected {(batch, *rest)} or {tuple(coefficients.shape)}"
        )
    return line.flatten(1).unsqueeze(1)


@torch.library.custom_op("certtrain::crown_relu_step", mutates_args=())
def _crown(
    coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor, upper_intercept: Tensor, upper: bool
) -> tuple[Tensor, Tensor]:
    tensors = (t.contiguous() for t in (coefficients, lower_slope, upper_slope, upper_intercept))
    return backend_for(coefficients).crown(*tensors, upper)


@torch.library.custom_op("certtrain::crown_relu_step_backward", mutates_args=())
def _crown_backward(
    grad: Tensor, grad_bias: Tensor, coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor,
    upper_intercept: Tensor, upper: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (
        t.contiguous() for t in (grad, grad_bias, coefficients, lower_slope, upper_slope, upper_intercept)
    )  # fmt: skip
    return backend_for(coefficients).crown_backward(*tensors, upper)


def _fake(
    coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor, upper_intercept: Tensor, upper: bool
) -> tuple[Tensor, Tensor]:
    return coefficients.new_empty(coefficients.shape), coefficients.new_empty(coefficients.shape[:2])


def _fake_backward(
    grad: Tensor, grad_bias: Tensor, coefficients: Tensor, lower_slope: Tensor, upper_slope: Tensor,
    upper_intercept: Tensor, upper: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (coefficients, lower_slope, upper_slope, upper_intercept))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, ctx.upper = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    return *_crown_backward(grad, grad_bias, *ctx.saved_tensors, ctx.upper), None


register(_crown, fake=_fake, backward=_crown_backward, fake_backward=_fake_backward, save=_save, gradient=_gradient)
