"""Registration of ops in torch.library: the gradient is an op of its own, and autocast computes in float32.

Numbers near 1 are 1/128 apart in bfloat16, more than the radius 1/255: an interval would lose its radius to rounding.
So these ops compute in float32 under autocast, in eager mode and compiled alike.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .dispatch import chosen


class Op(Protocol):
    """The part of ``torch.library.CustomOpDef`` used here, whose own annotations are incomplete."""

    def register_fake(self, fn: Callable[..., Any], /) -> Any: ...

    def register_autocast(self, device_type: str, cast_inputs: torch.dtype, /) -> Any: ...

    def register_autograd(
        self, backward: Callable[..., Any], /, *, setup_context: Callable[..., None] | None = None
    ) -> None: ...


def register(
    op: Op,
    *,
    fake: Callable[..., Any],
    backward: Op | None = None,
    fake_backward: Callable[..., Any] | None = None,
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    gradient: Callable[..., Sequence[Tensor | None]] | None = None,
) -> None:
    """Register an op's fake tensors, autocast and, if it has one, gradient.

    Args:
        backward, fake_backward: the op that ``gradient`` calls. It has no gradient, and raises on a second derivative.
        save: ``setup_context`` of autograd; gradient: its ``backward``.
    """
    _finish(op, fake)
    if backward is None or fake_backward is None or gradient is None:
        return
    _finish(backward, fake_backward)
    op.register_autograd(gradient, setup_context=save)
    backward.register_autograd(_no_second_derivative(op), setup_context=_keep_nothing)


def _finish(op: Op, fake: Callable[..., Any]) -> None:
    op.register_fake(fake)
    for device in ("cpu", "cuda"):
        op.register_autocast(device, torch.float32)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...


def _no_second_derivative(op: Op) -> Callable[..., None]:
    name = repr(op).split("::")[1].rstrip(")>")  # <CustomOpDef(certtrain::name)>

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} has no second derivative; accepted: the same call under kernels.reference, which is plain torch"
        )

    return refuse


def dense(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer's six gradients as an op must return them: tensors, empty ones in place of None."""
    center, radius, weight, bias, scale, shift = (like.new_empty(0) if g is None else g for g in grads)
    return center, radius, weight, bias, scale, shift


def asked(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients for autograd: None where ``needs`` is False."""
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]


SMALL = 1 << 18
"""Entries of the output below which plain torch is faster on the CPU than an op, whose call costs 20 to 100 µs more:
ReLU forward + backward of 2^12, 2^16, 2^18 entries takes 0.48, 0.75, 2.7 times the op's time (two threads)."""


def formula_is_faster(tensor: Tensor, entries: int) -> bool:
    """Whether the plain formula is faster for an output of this size: on the CPU for small ones, and under a compiler,
    since Inductor fuses the formula but not an op."""
    if tensor.device.type != "cpu":
        return False
    return not chosen() and (torch.compiler.is_compiling() or entries < SMALL)


def plain(formula: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a formula as an op would run it: in float32 under autocast."""
    if not torch.is_autocast_enabled("cpu"):
        return formula(*arguments, **options)
    with torch.autocast("cpu", enabled=False):
        return formula(*(_widened(a) for a in arguments), **{name: _widened(a) for name, a in options.items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
