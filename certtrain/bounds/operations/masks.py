"""Choices between values by a constant condition, entry by entry: ``torch.where`` and ``masked_fill``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .options import refuse
from .registry import Constant, Tracing, from_function
from .scale import Scale
from .sum import Sum

EITHER = "a constant condition, and values or constants to choose from"


def where(tracing: Tracing, node: fx.Node) -> int:
    """Tracing rule of ``torch.where``, whose first argument is the condition: the chosen entries of both, summed."""
    names = "condition", "input", "other"
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    if given.keys() != set(names):
        refuse(node, f"arguments {', '.join(given)}", EITHER)
    condition = _known(tracing, node, given["condition"])
    if not isinstance(condition, Constant):
        refuse(node, "a condition computed from the images", EITHER)
    parts: list[int] = []
    for name, chosen in (("input", True), ("other", False)):
        value = _known(tracing, node, given[name])
        if not isinstance(value, Constant):
            parts.append(_masked(tracing, node, value, condition, chosen, None))
            if len(parts) == 2:
                return tracing.append(Sum(node.name, (parts[0], parts[1])))
            continue
        other = _known(tracing, node, given["other" if chosen else "input"])
        if isinstance(other, Constant):
            refuse(node, "two constants", EITHER)
        return _masked(tracing, node, other, condition, not chosen, value)
    raise AssertionError("two values, or a constant")


@from_function("masked_fill", "masked_fill_")
def _masked_fill(tracing: Tracing, node: fx.Node, source: int) -> int:
    given = dict(zip(("mask", "value"), node.args[1:])) | {k: v for k, v in node.kwargs.items() if k != "input"}
    mask, value = (_known(tracing, node, given.get(name)) for name in ("mask", "value"))
    if not isinstance(mask, Constant) or not isinstance(value, Constant):
        refuse(node, "a mask or a value computed from the images", "constants")
    return _masked(tracing, node, source, mask, False, value)


def _known(tracing: Tracing, node: fx.Node, argument: Any) -> Constant | int:
    """A constant, or the position of a computed value."""
    value = tracing.values.get(argument) if isinstance(argument, fx.Node) else Constant.number(argument)
    if isinstance(value, Constant) or type(value) is int:
        return value
    return refuse(node, f"{argument}", EITHER)


def _masked(
    tracing: Tracing, node: fx.Node, source: int, condition: Constant, chosen: bool, otherwise: Constant | None
) -> int:
    """Append the value where the condition is ``chosen``, and a constant, or 0, elsewhere."""

    def coefficients() -> tuple[Tensor, Tensor | float]:
        kept = torch.as_tensor(condition.value()).bool() == chosen
        if otherwise is None:
            return kept.float(), 0.0
        rest = torch.as_tensor(otherwise.value(), device=kept.device)
        return kept.to(rest.dtype if rest.is_floating_point() else torch.float32), torch.where(kept, 0, rest)

    return tracing.append(Scale(node.name, (source,), coefficients))
