"""Registry of tracing rules: which modules and functions of a model become which operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx, nn

from .base import Operation, UnsupportedOperation


class Tracing(Protocol):
    """A network that grows while the steps of torch.fx's graph are walked along: what rules append to.

    Args:
        operations: so far. values: by step of the graph the position of its output, a constant or a marker.
    """

    operations: list[Operation]
    values: dict[fx.Node, Any]

    def append(self, operation: Operation) -> int:
        """Add an operation; returns its position."""
        ...

    def position(self, node: fx.Node, argument: Any) -> int:
        """The position of a computed operand of ``node``.

        Raises:
            UnsupportedOperation: it is a constant.
        """
        ...


ModuleRule = Callable[[Tracing, str, int, Any], "int | None"]
"""(tracing, path, position of the input, module) → position of the output; None: this module has no rule."""
FunctionRule = Callable[[Tracing, fx.Node, int], Any]
"""(tracing, step of torch.fx's graph, position of its first operand) → position of the output, or its pieces."""

MODULES: dict[type[nn.Module], ModuleRule] = {}
FUNCTIONS: dict[str, FunctionRule] = {}


class BatchSize:
    """Placeholder for x.size(0) while tracing."""


class EvaluationMode(int):
    """Stands for ``owner.training`` in evaluation mode while tracing: 0, and known to follow the module's mode."""

    owner: nn.Module

    def __new__(cls, owner: nn.Module) -> EvaluationMode:
        mode = super().__new__(cls, 0)
        mode.owner = owner
        return mode


@dataclass(frozen=True, eq=False)
class Pieces:
    """The results of a function that gives several, of the value at ``source``: a selection each, appended when read.

    Args:
        function: (B, *shape) → the results, each with the entries in their order.
    """

    source: int
    function: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Constant:
    """A number, or a tensor looked up at each use, since ``.to(device)`` replaces buffers."""

    owner: Any
    name: str = ""
    computed: bool = False

    @classmethod
    def number(cls, value: Any) -> Constant:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnsupportedOperation(f"found the constant {value!r}; accepted: a number, a parameter or a buffer")
        return cls(value)

    def value(self) -> Any:
        if self.computed:
            return self.owner()
        return getattr(self.owner, self.name) if self.name else self.owner


def from_module(*kinds: type[nn.Module]) -> Callable[[ModuleRule], ModuleRule]:
    """Register the tracing rule of modules of these classes and their subclasses.

    torch.fx does not trace into them. The rule appends operations to ``tracing`` and returns the last one's position.
    """

    def register(rule: ModuleRule) -> ModuleRule:
        MODULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


def from_function(*names: str) -> Callable[[FunctionRule], FunctionRule]:
    """Register the tracing rule of functions and tensor methods with these names."""

    def register(rule: FunctionRule) -> FunctionRule:
        FUNCTIONS.update(dict.fromkeys(names, rule))
        return rule

    return register


def rule_of(module: nn.Module) -> ModuleRule | None:
    """The rule of the module's class, or of its nearest base class with one."""
    return next((MODULES[kind] for kind in type(module).__mro__ if kind in MODULES), None)


def number(node: fx.Node, place: int, name: str, missing: float | None = None) -> float:
    """A number among a function's arguments, by its place or its name; ``missing`` where it is left out or None.

    Raises:
        UnsupportedOperation: it is something else, or required.
    """
    found: Any = node.kwargs.get(name, node.args[place] if len(node.args) > place else None)
    found = missing if found is None else found
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise UnsupportedOperation(f"{node.name!r}: found {name}={found}; accepted: a number")
    return float(found)


def entrywise(kind: Callable[[str, tuple[int, ...]], Operation]) -> FunctionRule:
    """The rule of a function without options."""

    def rule(tracing: Tracing, node: fx.Node, source: int) -> int:
        options = [str(option) for option in node.args[1:]] + [f"{k}={v}" for k, v in node.kwargs.items()
                                                               if k not in ("input", "inplace")]  # fmt: skip
        if options:
            raise UnsupportedOperation(f"{node.name!r}: found {', '.join(options)}; accepted: no options")
        return tracing.append(kind(node.name, (source,)))

    return rule


def supported() -> str:
    """A list of all modules and functions that have a rule, for messages."""
    modules = ", ".join(kind.__name__ for kind in MODULES)
    functions = ", ".join(name for name in FUNCTIONS if not name.endswith("_"))
    return (
        f"{modules}; the functions {functions} that keep the batch dimension, cat and stack of computed values along "
        "any other, and + - * / with another computed value or with constants"
    )
