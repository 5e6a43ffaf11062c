"""What torch.fx would not tell: changes in place, hooks, and when a graph has gone stale.

Each of these, unseen, would give bounds of another network than the one that runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import fx, nn

from . import program as p


def signature(model: nn.Module) -> Signature:
    """What a program depends on besides tensors: modules and their order, plain attributes, hooks."""
    return tuple(
        (path, module, [item for item in vars(module).items() if _is_plain(*item)], _has_hooks(module))
        for path, module in model.named_modules(remove_duplicate=False)
    )


Signature = tuple[tuple[str, nn.Module, list[tuple[str, Any]], bool], ...]


def _is_plain(name: str, value: Any) -> bool:
    if isinstance(value, tuple):  # a tuple of tensors cannot be compared
        return all(_is_plain(name, item) for item in value)
    return name != "training" and isinstance(value, (bool, int, float, str, FunctionType))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def refuse_hidden_forward(path: str, module: nn.Module) -> None:
    """torch.fx reads the class' forward: it would not see these."""
    where = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
    if _has_hooks(module):
        raise p.UnsupportedNode(f"{where} has forward hooks; accepted: none")
    if "forward" in vars(module):
        raise p.UnsupportedNode(f"{where} has a forward of its own beside its class'; accepted: the class' forward")


class _Proxy(fx.Proxy):
    """Records ``x += y`` as the in-place operation that it is; torch.fx's own would record ``x + y``."""

    def _augmented(self, operation: Callable, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.itruediv, other)


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else what forward computes of a buffer is frozen while tracing

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def first_operand(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


_VIEWS = ("view", "reshape", "flatten", "contiguous", "getitem")


def refuse_shared_mutation(model: nn.Module, node: fx.Node) -> None:
    """An in-place operation changes what *other* readers of its input see; the program would not, so its
    bounds would be those of another network."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = getattr(module, "inplace", False) or node.kwargs.get("inplace") or (
        node.op != "call_module" and name.endswith("_") and not name.endswith("__")
    ) or node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)  # fmt: skip
    value = first_operand(node)
    while in_place and isinstance(value, fx.Node):
        if len(value.users) > 1:
            raise p.UnsupportedNode(
                f"{name} at {node.name!r} changes {value.name!r} in place while others read it; accepted: inplace=False"
            )
        layer = model.get_submodule(str(value.target)) if value.op == "call_module" else None
        views = isinstance(layer, (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)) or (
            getattr(layer, "inplace", False) or getattr(value.target, "__name__", value.target) in _VIEWS
        )
        value = first_operand(value) if views else None
