"""Checks that torch.fx lacks: in-place changes, hooks, and whether a traced graph is out of date.

Any of these, undetected, would give bounds of another network than the one that runs.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

from ..typed import (
    forward_hooks,
    forward_pre_hooks,
    has_global_forward_hooks,
    is_mapping,
    is_sequence_or_set,
    named_modules,
)
from .operations.base import UnsupportedOperation
from .operations.registry import MODULES
from .wrappers import computed


def signature(model: nn.Module) -> Signature:
    """Everything but tensor values that a traced network depends on: modules in order, classes, attributes, hooks.

    Two signatures are equal only if none of these has changed.
    """
    return tuple(
        (path, SameObject(module), _class_contents(type(module)), _attributes(vars(module)), _has_hooks(module))
        for path, module in named_modules(model, remove_duplicate=False)
    )


Signature = tuple[tuple[str, "SameObject", Any, Any, bool], ...]


@dataclass(frozen=True, eq=False)
class SameObject:
    """Wrapper that compares by identity and keeps its object alive; not hashable."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameObject) and self.value is other.value


_BOOKKEEPING = {*vars(nn.Module()), "_certtrain_network"}
"""Attributes that every module has: mode, tensors (looked up at each use), submodules, hooks."""
_DEPTH = 3
"""Levels of nested containers and objects that a signature compares by content; deeper ones count by identity."""


def _attributes(values: Mapping[str, Any], depth: int = _DEPTH) -> list[tuple[str, Any]]:
    return [(name, _snapshot(value, depth)) for name, value in values.items() if name not in _BOOKKEEPING]


def _class_contents(kind: type) -> list[Any]:
    """Attributes defined by classes outside torch: their forward or constants may be replaced."""
    own = itertools.takewhile(lambda base: not base.__module__.startswith("torch."), kind.__mro__)
    return [(SameObject(base), [(name, _snapshot(value, 1)) for name, value in vars(base).items()]) for base in own]


def _snapshot(value: Any, depth: int) -> Any:
    """A comparable copy: numbers, strings, containers and plain objects by content, anything else by identity."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return type(value), value
    if depth == 0 or isinstance(value, (nn.Module, Tensor)):
        return SameObject(value)
    if is_mapping(value):
        return type(value), [(_snapshot(key, depth - 1), _snapshot(item, depth - 1)) for key, item in value.items()]
    if is_sequence_or_set(value):
        return type(value), [_snapshot(item, depth - 1) for item in value]
    if type(value).__module__.startswith("torch") or isinstance(value, (type, ModuleType, FunctionType)):
        return SameObject(value)
    return SameObject(value), _attributes(getattr(value, "__dict__", {}), depth - 1)


def _has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks, or all modules have, other than those that compute a weight."""
    computing = len(computed(module))
    return bool(forward_hooks(module)) or len(forward_pre_hooks(module)) > computing or has_global_forward_hooks()


def refuse_hidden_forward(path: str, module: nn.Module) -> None:
    """Refuse hooks, a forward on the instance and an overridden __call__: torch.fx reads only the class' forward."""
    where = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
    refuse_hooks(where, module)
    if "forward" in vars(module):
        raise UnsupportedOperation(f"{where} has a forward of its own beside its class'; accepted: the class' forward")
    kind = type(module)
    if isinstance(module, fx.GraphModule):  # has a class of its own, whose __call__ reports errors
        kind = kind.__mro__[1]
    if kind.__call__ is not nn.Module.__call__:
        raise UnsupportedOperation(f"{where} overrides __call__; accepted: a class that defines forward alone")


def refuse_hooks(where: str, module: nn.Module) -> None:
    if _has_hooks(module):
        raise UnsupportedOperation(f"{where} has forward hooks; accepted: none")


IN_PLACE = {name: getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv")}


_TRACING = threading.RLock()


class _Proxy(fx.Proxy):
    """Records ``x += y`` as an in-place operation; torch.fx's own proxy would record ``x + y``."""

    def _augmented(self, operation: str, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", IN_PLACE[operation], (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._augmented("iadd", other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._augmented("isub", other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._augmented("imul", other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._augmented("itruediv", other)


class Tracer(fx.Tracer):
    """Traces modules that have a rule as leaves.

    torch.fx replaces ``nn.Module.__call__`` of the whole process while it traces. Other threads' calls go through
    unchanged here, and they trace in turn: two traces at once would leave each other's replacement behind.
    """

    proxy_buffer_attributes = True  # otherwise values computed from buffers are frozen while tracing

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _TRACING:
            return super().trace(root, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in MODULES or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def first_operand(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


_VIEWS = ("view", "reshape", "flatten", "contiguous", "getitem")


def refuse_shared_mutation(model: nn.Module, node: fx.Node) -> None:
    """Refuse an in-place operation whose input has other readers: they read the changed value in the model, but the
    unchanged one in the network.

    Raises:
        UnsupportedOperation: naming the operation and its input.
    """
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = getattr(module, "inplace", False) or node.kwargs.get("inplace") or (
        node.op != "call_module" and name.endswith("_") and not name.endswith("__")
    ) or node.target in IN_PLACE.values()  # fmt: skip
    value = first_operand(node)
    while in_place and isinstance(value, fx.Node):
        if len(value.users) > 1:
            raise UnsupportedOperation(
                f"{name} at {node.name!r} changes {value.name!r} in place while others read it; accepted: inplace=False"
            )
        layer = model.get_submodule(str(value.target)) if value.op == "call_module" else None
        views = isinstance(layer, (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)) or (
            getattr(layer, "inplace", False) or getattr(value.target, "__name__", value.target) in _VIEWS
        )
        value = first_operand(value) if views else None
