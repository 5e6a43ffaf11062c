"""Checks that torch.fx lacks: in-place changes, hooks, and whether a traced graph is out of date.

Any of these, undetected, would give bounds of another network than the one that runs.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..typed import (
    forward_hooks,
    forward_pre_hooks,
    has_global_forward_hooks,
    is_mapping,
    is_sequence_or_set,
    map_arg,
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


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Context manager for evaluation mode; restores the mode of every module."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


IN_PLACE = {name: getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv")}


_TRACING = threading.RLock()


class _Sizes(Sequence[Any]):
    """The shape of a value: numbers, except for the batch's size, which is a step of the graph."""

    def __init__(self, value: _Proxy):
        self.of = value

    @property
    def whole(self) -> tuple[Any, ...]:
        return (self.batch, *self.of.recorder.shape_of(self.of.node)[1:])

    @property
    def batch(self) -> Any:
        return self.of.tracer.create_proxy("call_method", "size", (self.of, 0), {})

    def __getitem__(self, index: Any) -> Any:
        return self.batch if type(index) is int and index == 0 else self.whole[index]

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.whole)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same numbers behind the batch's; two batches of one forward are of one size.

        Raises:
            UnsupportedOperation: the other is of numbers alone.
        """
        if isinstance(other, _Sizes):
            return self.whole[1:] == other.whole[1:]
        raise UnsupportedOperation(
            "found a comparison of the batch's size with a number; accepted: of the sizes behind"
        )

    def __fx_create_arg__(self, tracer: fx.Tracer) -> Any:
        return tracer.create_arg(self.whole)


class _Proxy(fx.Proxy):
    """Records ``x += y`` as an in-place operation, and gives sizes as numbers.

    torch.fx's own proxy would record ``x + y``, and sizes as unknown.
    """

    @property
    def recorder(self) -> Tracer:
        assert isinstance(self.tracer, Tracer)
        return self.tracer

    @property
    def shape(self) -> _Sizes:
        return _Sizes(self)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def mT(self) -> Any:  # torch's name
        return cast(Any, self).transpose(-2, -1)

    def expand_as(self, other: fx.Proxy) -> Any:
        return cast(Any, self).expand(other.shape)

    def view_as(self, other: fx.Proxy) -> Any:
        return cast(Any, self).view(other.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

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

    def __init__(self, shape: torch.Size | None = None) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._shape, self._known, self._evaluates = shape, dict[fx.Node, Any](), False
        self.sized = False
        """Whether forward has read a size."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _TRACING:
            return super().trace(root, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread or self._evaluates:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread or self._evaluates:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """As torch.fx's, but options of forward have their defaults as values."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        first = 2 if is_module else 1  # behind the module and the images
        return function, [
            one.node.args[0] if place >= first and isinstance(one, fx.Proxy) and one.node.args else one
            for place, one in enumerate(arguments)
        ]

    def shape_of(self, node: fx.Node) -> torch.Size:
        """The shape of a step's value for a batch of two.

        Raises:
            UnsupportedOperation: the images' shape is not known.
        """
        if self._shape is None:
            raise UnsupportedOperation("found a forward that reads sizes; accepted: trace(model, shape of one image)")
        return self._value_of(node).shape

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The results of a function that gives several, which forward unpacks or loops over."""
        value = self._value_of(obj.node) if self._shape is not None else None
        if not is_sequence_or_set(value):
            return cast(Any, super()).iter(obj)
        several: Any = obj
        return iter([several[place] for place in range(len(value))])

    @torch.no_grad()
    def _value_of(self, node: fx.Node) -> Any:
        """A step's value for a batch of two images of zeros, found by running the steps so far."""
        assert self._shape is not None
        self.sized, self._evaluates = True, True
        try:
            with evaluation_mode(self.root):
                for step in self.graph.nodes:
                    if step not in self._known:
                        self._known[step] = self._value(step, self._shape)
        finally:
            self._evaluates = False
        return self._known[node]

    def _value(self, node: fx.Node, shape: torch.Size) -> Any:
        read: Callable[[fx.Node], Any] = self._known.__getitem__
        given: tuple[Any, Any] = map_arg((node.args, node.kwargs), read)
        (arguments, keywords), target = given, cast(Any, node.target)
        match node.op:
            case "placeholder":
                if self._known:
                    return node.args[0] if node.args else None
                tensors = (*self.root.parameters(), *self.root.buffers())
                like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
                return like.new_zeros(2, *shape)
            case "get_attr":
                return operator.attrgetter(target)(self.root)
            case "call_module":
                return self.root.get_submodule(target)(*arguments, **keywords)
            case "call_method":
                return getattr(arguments[0], target)(*arguments[1:], **keywords)
            case _:
                return target(*arguments, **keywords)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in MODULES or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def first_operand(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


_VIEWS = (
    "view", "reshape", "flatten", "contiguous", "getitem", "permute", "transpose", "swapaxes", "swapdims", "movedim",
    "moveaxis", "squeeze", "unsqueeze", "unflatten", "narrow", "select", "expand", "chunk", "split", "tensor_split",
    "unbind", "float", "to", "type", "positive", "dropout", "dropout1d", "dropout2d", "feature_dropout",
)  # fmt: skip
"""Functions that may give their first operand's memory."""


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
        views = isinstance(layer, (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)) or (
            getattr(layer, "inplace", False) or getattr(value.target, "__name__", value.target) in _VIEWS
        )
        value = first_operand(value) if views else None
