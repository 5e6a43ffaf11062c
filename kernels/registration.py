"""How an op enters torch.library: its gradient is an op of its own, and autocast computes in float32.

In bfloat16 the numbers near 1 are 1/128 apart, more than the radius 1/255: under autocast an interval would lose its
radius to rounding. So these ops compute in float32 there, in eager mode and compiled alike.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .dispatch import chosen


class Op(Protocol):
    """The part of ``torch.library.CustomOpDef`` that is used here; torch leaves its own annotations bare."""

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
    """Finish an op: fake tensors, autocast and, where it has one, its gradient.

    Args:
        backward, fake_backward: the op that ``gradient`` calls. It has no gradient and raises if asked for one.
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
    """A layer's six gradients as its op returns them, all of them tensors: an empty one where none was asked for."""
    center, radius, weight, bias, scale, shift = (like.new_empty(0) if g is None else g for g in grads)
    return center, radius, weight, bias, scale, shift


def asked(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """What autograd gets of them."""
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]


SMALL = 1 << 18
"""Entries of the output below which plain torch is as fast on the CPU as an op, whose calls cost 20 to 100 µs more:
ReLU forward + backward of 2^12, 2^16, 2^18 entries takes 0.48, 0.75, 2.7 of the op's time (two threads)."""


def formula_is_faster(tensor: Tensor, entries: int) -> bool:
    """Whether to leave an output of so many entries to the plain formula: on the CPU where it is small, and under a
    compiler, since Inductor fuses the formula there and cannot look into an op."""
    if tensor.device.type != "cpu":
        return False
    return not chosen() and (torch.compiler.is_compiling() or entries < SMALL)


def plain(formula: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The formula with the op's rule under autocast: computed in float32."""
    if not torch.is_autocast_enabled("cpu"):
        return formula(*arguments, **options)
    with torch.autocast("cpu", enabled=False):
        return formula(*(_widened(a) for a in arguments), **{name: _widened(a) for name, a in options.items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
