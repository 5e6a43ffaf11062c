"""Registry of tracing rules: which modules and functions of a model become which operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import fx, nn

from .base import Operation


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
FunctionRule = Callable[[Tracing, fx.Node, int], int]
"""(tracing, step of torch.fx's graph, position of its first operand) → position of the output."""

MODULES: dict[type[nn.Module], ModuleRule] = {}
FUNCTIONS: dict[str, FunctionRule] = {}


class BatchSize:
    """Placeholder for x.size(0) while tracing."""


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


def supported() -> str:
    """A list of all modules and functions that have a rule, for messages."""
    modules = ", ".join(kind.__name__ for kind in MODULES)
    functions = ", ".join(name for name in FUNCTIONS if not name.endswith("_"))
    return (
        f"{modules}; the functions {functions} that keep the batch dimension, cat of computed values along any other, "
        "and + - * / with another computed value or with constants"
    )
