"""How an op enters torch.library: its gradient is an op of its own, and autocast computes in float32.

In bfloat16 the numbers near 1 are 1/128 apart, more than the radius 1/255: under autocast an interval would lose its
radius to rounding. So these ops compute in float32 there, in eager mode and compiled alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .dispatch import chosen


def register(
    op: CustomOpDef,
    *,
    fake: Callable,
    backward: CustomOpDef | None = None,
    fake_backward: Callable | None = None,
    save: Callable[[Any, tuple, Any], None] | None = None,
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
    backward.register_autograd(_no_second_derivative(op), setup_context=lambda ctx, inputs, output: None)


def _finish(op: CustomOpDef, fake: Callable) -> None:
    op.register_fake(fake)
    for device in ("cpu", "cuda"):
        op.register_autocast(device, torch.float32)


def _no_second_derivative(op: CustomOpDef) -> Callable:
    name = op._qualname.split("::")[1]

    def refuse(ctx: Any, *grads: Tensor):
        raise RuntimeError(
            f"{name} has no second derivative; accepted: the same call under kernels.reference, which is plain torch"
        )

    return refuse


def dense(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What an op returns of gradients: an op returns tensors, so an empty one where nothing was asked for."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


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


def plain(formula: Callable, *arguments: Any, **options: Any) -> Any:
    """The formula with the op's rule under autocast: computed in float32."""
    if not torch.is_autocast_enabled("cpu"):
        return formula(*arguments, **options)
    with torch.autocast("cpu", enabled=False):
        return formula(*(_widened(a) for a in arguments), **{name: _widened(a) for name, a in options.items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
