"""Trace an nn.Module into a network, by torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from ..typed import named_modules
from .graph import (
    Signature,
    Tracer,
    evaluation_mode,
    first_operand,
    refuse_hidden_forward,
    refuse_hooks,
    refuse_shared_mutation,
    signature,
)
from .network import Network, NetworkModule, ending_with
from .operations import Input, Operation, Rearrangement, Scale, Sum, UnsupportedOperation
from .operations.concat import concat, stack
from .operations.options import OTHER_WAY
from .operations.registry import FUNCTIONS, BatchSize, Constant, EvaluationMode, Pieces, rule_of, supported
from .operations.scale import Coefficients
from .wrappers import is_wrapper, unwrapped, with_computed_tensors


@dataclass(frozen=True, eq=False)
class _Traced:
    """A network, the signature of the traced model, and the images' shape if forward reads sizes.

    It is not copied or pickled with the model.
    """

    network: Network
    signature: Signature
    shape: torch.Size | None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def trace(model: nn.Module | Network, shape: torch.Size | None = None) -> Network:
    """The network of a model that maps a batch (B, *shape) to logits (B, K), traced once and kept on the model.

    The model is traced in evaluation mode, as bounds enclose it. A ``Network`` is returned as it is.

    Args:
        shape: of one image, for a model whose forward reads sizes: its network is one for images of this shape. None
            takes the shape that the model was last traced for.
    Raises:
        UnsupportedOperation: an operation without a rule, named with its path in the model; or sizes are read and no
            shape is known.
    """
    if isinstance(model, Network):
        return model
    if isinstance(model, NetworkModule):
        return model.network
    kept: _Traced | None = model.__dict__.get(_KEPT)
    if not is_traced(model) or (kept and shape is not None and kept.shape not in (None, shape)):
        shape = kept.shape if kept and shape is None else shape
        for path, module in named_modules(model):
            if is_wrapper(module):
                refuse_hooks(f"{type(module).__name__} at {path!r}", module)
        with _following_modes(model), unwrapped(model) as inside:
            tracing = _Tracing(inside, shape)
            operations = tracing.operations_of_model()
        read = shape if tracing.tracer.sized else None
        model.__dict__[_KEPT] = _Traced(Network(operations), signature(model), read)
    return model.__dict__[_KEPT].network


_KEPT = "_certtrain_network"


def is_traced(model: nn.Module) -> bool:
    """Whether the model has a traced network that is still up to date."""
    traced = model.__dict__.get(_KEPT)
    return traced is not None and traced.signature == signature(model)


def forget(model: nn.Module) -> None:
    """Make the next ``trace`` trace the model anew, as after a change of a closure or global that its forward reads."""
    model.__dict__.pop(_KEPT, None)


@contextmanager
def _following_modes(model: nn.Module) -> Generator[None]:
    """Context manager for evaluation mode in which options that follow a module's mode are known as such."""
    with evaluation_mode(model):
        for module in model.modules():
            if not type(module).__module__.startswith("torch.nn."):  # torch's own may run in other threads meanwhile
                module.training = cast(bool, EvaluationMode(module))
        yield


_CONSTANT_FUNCTIONS = ("view", "reshape", "unsqueeze", "squeeze", "getitem", "exp", "sqrt", "reciprocal", "neg",
                       "abs", "float", "permute", "transpose", "expand", "flatten", "t", "mean", "sum")  # fmt: skip


_ARITHMETIC: tuple[Any, ...] = (
    *(getattr(operator, name) for name in ("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv")),
    *(torch.add, torch.sub, torch.mul, torch.div),
)


class _Tracing:
    """One walk over torch.fx's graph; ``values`` maps each fx node to a position, a constant or a placeholder."""

    def __init__(self, model: nn.Module, shape: torch.Size | None):
        self.model, self.tracer = model, Tracer(shape)
        self.operations: list[Operation] = []
        self.values: dict[fx.Node, Any] = {}

    def operations_of_model(self) -> tuple[Operation, ...]:
        """Trace the model.

        Raises:
            UnsupportedOperation: naming the operation and its path in the model.
        """
        refuse_hidden_forward("", self.model)
        # a model that is a single layer is wrapped: torch.fx would trace into it
        single = self.tracer.is_leaf_module(self.model, "") and not isinstance(self.model, nn.Sequential)
        self.root = nn.Sequential(self.model) if single else self.model
        before = set(vars(self.root))
        try:
            graph = self.tracer.trace(self.root)
        except Exception as error:  # whatever the model's forward raises on a proxy
            raise UnsupportedOperation(
                f"{type(self.model).__name__}: its forward cannot be traced ({' '.join(str(error).split())}); "
                f"accepted: a forward without branches on values; {OTHER_WAY}"
            ) from error
        finally:
            for name in set(vars(self.root)) - before:  # torch.fx stores tensors made in forward on the model
                delattr(self.root, name)
        *steps, output = graph.nodes
        for node in steps:
            refuse_shared_mutation(self.root, node)
            self.values[node] = self._visit(node)
        value = output.args[0]
        if not isinstance(value, fx.Node) or type(self.values[value]) is not int:
            raise UnsupportedOperation(f"output: found {value}; accepted: one tensor of logits")
        return ending_with(self.operations, self.values[value])

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if not self.operations:
                return self.append(Input("input", ()))
            if node.users or not (node.args or str(node.target).startswith("*")):
                raise UnsupportedOperation(f"{node.name}: a second input; accepted: a model of one input")
            return None
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            if name.startswith("_tensor_constant"):
                raise UnsupportedOperation("a tensor made inside forward; accepted: buffers, parameters and numbers")
            return Constant(self.root.get_submodule(owner), name)
        return self._module(node) if node.op == "call_module" else self._function(node)

    def append(self, operation: Operation) -> int:
        """Append an operation and return its position."""
        self.operations.append(operation)
        return len(self.operations) - 1

    def _module(self, node: fx.Node) -> int:
        path, module = str(node.target), self.root.get_submodule(str(node.target))
        refuse_hidden_forward(path, module)
        source = self.position(node, first_operand(node))
        module = with_computed_tensors(module)
        rule = rule_of(module)
        position = None if rule is None else rule(self, path, source, module)
        if position is None:
            raise UnsupportedOperation(
                f"{type(module).__name__} at {path!r} has no bound rule; supported: {supported()}; {OTHER_WAY}"
            )
        return position

    def _function(self, node: fx.Node) -> Any:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        first = first_operand(node)
        value = self.values.get(first) if isinstance(first, fx.Node) else first
        if name == "size" and node.args[1:] == (0,):
            return BatchSize()
        if name == "getitem" and isinstance(value, Pieces) and type(node.args[1]) is int:
            return self._piece(node.name, value, node.args[1])
        if node.target in _ARITHMETIC or (
            node.op == "call_method" and name.rstrip("_") in ("add", "sub", "mul", "div")
        ):
            return self._arithmetic(node, name.rstrip("_").removeprefix("i").removeprefix("true"))
        if isinstance(value, Constant) and name in _CONSTANT_FUNCTIONS:
            return self._computed(node)
        if name in ("cat", "concat", "concatenate"):
            return concat(self, node)
        if name == "stack":
            return stack(self, node)
        if name in FUNCTIONS:
            return FUNCTIONS[name](self, node, self.position(node, first))
        raise UnsupportedOperation(f"{name} at {_place(node)} has no bound rule; supported: {supported()}; {OTHER_WAY}")

    def _piece(self, path: str, pieces: Pieces, index: int) -> int:
        return self.append(Rearrangement(path, (pieces.source,), lambda x: pieces.function(x)[index]))

    def _computed(self, node: fx.Node) -> Constant:
        """A constant computed from constants, evaluated at each use because buffers may change."""
        arguments = [self.values[a] if isinstance(a, fx.Node) else a for a in node.args]
        if node.kwargs or any(
            type(a) is int and isinstance(n, fx.Node) for a, n in zip(arguments, node.args, strict=True)
        ):
            raise UnsupportedOperation(
                f"{node.name!r}: found options or computed values; accepted: a constant made of constants alone"
            )

        def compute() -> Any:
            values = [a.value() if isinstance(a, Constant) else a for a in arguments]
            if isinstance(node.target, str):
                return getattr(values[0], node.target)(*values[1:])
            return node.target(*values)

        return Constant(compute, computed=True)

    def position(self, node: fx.Node, argument: Any) -> int:
        """The position of an argument of ``node``.

        Raises:
            UnsupportedOperation: the argument is not a tensor computed from the images.
        """
        value = self.values.get(argument) if isinstance(argument, fx.Node) else argument
        if type(value) is not int or not isinstance(argument, fx.Node):
            raise UnsupportedOperation(
                f"{node.name!r}: found an input that is not computed from the images; accepted: one that is"
            )
        return value

    def _arithmetic(self, node: fx.Node, kind: str) -> Any:
        if node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"} or len(node.args) != 2:
            raise UnsupportedOperation(f"{kind} at {node.name!r}: accepted: two operands and no options")
        left, right = (self.values[a] if isinstance(a, fx.Node) else Constant.number(a) for a in node.args)
        positions = [value for value in (left, right) if type(value) is int]
        if not positions:
            return self._computed(node)
        if len(positions) == 2 and kind in ("add", "sub"):
            return self.append(Sum(node.name, (positions[0], positions[1]), 1.0 if kind == "add" else -1.0))
        if len(positions) == 2 and kind in FUNCTIONS:
            return FUNCTIONS[kind](self, node, positions[0])
        constant = right if type(left) is int else left
        if len(positions) != 1 or not isinstance(constant, Constant) or (kind == "div" and constant is left):
            raise UnsupportedOperation(
                f"{kind} at {_place(node)} has no bound rule for these operands; supported: {supported()}"
            )
        coefficients: dict[str, Coefficients] = {
            "add": lambda: (1.0, constant.value()),
            "sub": lambda: (1.0, -constant.value()) if constant is right else (-1.0, constant.value()),
            "mul": lambda: (constant.value(), 0.0),
            "div": lambda: (1.0 / constant.value(), 0.0),
        }
        return self.append(Scale(node.name, (positions[0],), coefficients[kind]))


def _place(node: fx.Node) -> str:
    """The node's name, and the module whose forward contains it, for messages."""
    path, kind = next(reversed(node.meta.get("nn_module_stack", {}).values()), ("", None))
    return repr(node.name) if kind is None else f"{node.name!r} in {kind.__name__} at {path!r}"
