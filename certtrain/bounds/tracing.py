"""nn.Module → program, by torch.fx."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import program as p
from .graph import Tracer, first_operand, refuse_hidden_forward, refuse_shared_mutation, signature


def trace(model: nn.Module) -> p.Program:
    """The program of a model that maps a batch (B, *shape) to logits (B, K). Traced once, kept on the model.

    Traced in evaluation mode: that is the network which bounds enclose.

    Raises:
        UnsupportedNode: an operation without a rule, named with its path in the model.
    """
    if isinstance(model, p.ProgramModule):
        return model.program
    program = model.__dict__.get("_certtrain_program")
    if program is None or program.signature != signature(model):
        training = {module: module.training for module in model.modules()}
        try:
            program = _Tracing(model.eval()).program()
        finally:
            for module, mode in training.items():
                module.training = mode
        model.__dict__["_certtrain_program"] = program
    return program


SUPPORTED = (
    "Linear, Conv2d, BatchNorm1d/2d, ReLU, LeakyReLU, Sigmoid, Tanh, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, "
    "Flatten, Dropout, Identity, their functional forms, view/reshape/flatten that keep the batch dimension, "
    "and + - * / with another node (+ and - only) or with constants"
)


class _BatchSize:
    """Stands for x.size(0) while tracing."""


class _Shape:
    """Stands for x.shape while tracing."""


class _Tracing:
    """One walk over torch.fx's graph; ``values`` maps each fx node to a position, a constant or a marker."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.nodes: list[p.Node] = []
        self.values: dict[fx.Node, Any] = {}

    def program(self) -> p.Program:
        refuse_hidden_forward("", self.model)
        tracer = Tracer()
        # a single layer as the whole model: torch.fx would look inside it
        single = tracer.is_leaf_module(self.model, "") and not isinstance(self.model, nn.Sequential)
        self.root = nn.Sequential(self.model) if single else self.model
        before = set(vars(self.root))
        try:
            graph = tracer.trace(self.root)
        except Exception as error:  # whatever the model's own forward raises when it meets a proxy
            raise p.UnsupportedNode(
                f"{type(self.model).__name__}: its forward cannot be traced ({error}); "
                "accepted: a forward without branches on values"
            ) from error
        finally:
            for name in set(vars(self.root)) - before:  # torch.fx leaves tensors that forward makes on the model
                delattr(self.root, name)
        *steps, output = graph.nodes
        for node in steps:
            refuse_shared_mutation(self.root, node)
            self.values[node] = self._visit(node)
        value = output.args[0]
        if not isinstance(value, fx.Node) or type(self.values[value]) is not int:
            raise p.UnsupportedNode(f"output: found {value}; accepted: one tensor of logits")
        nodes = p.fuse(self.nodes, self.values[value])
        return p.Program(nodes, signature(self.model))

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if not self.nodes:
                return self._append(p.Input("input", ()))
            if node.users or not node.args:
                raise p.UnsupportedNode(f"{node.name}: a second input; accepted: a model of one input")
            return None
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            if name.startswith("_tensor_constant"):
                raise p.UnsupportedNode("a tensor made inside forward; accepted: buffers, parameters and numbers")
            return _Constant(self.root.get_submodule(owner), name)
        return self._module(node) if node.op == "call_module" else self._function(node)

    def _append(self, node: p.Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _module(self, node: fx.Node) -> int:
        path, module = str(node.target), self.root.get_submodule(str(node.target))
        refuse_hidden_forward(path, module)
        source = self._position(node, first_operand(node))
        match module:
            case nn.Linear() | nn.Conv2d():
                return self._append(p.Affine(path, (source,), module))
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                return self._append(p.Norm(path, (source,), module))
            case nn.ReLU():
                return self._activate(path, source, p.Activation("relu"))
            case nn.LeakyReLU():
                return self._leaky(path, source, module.negative_slope)
            case nn.Sigmoid():
                return self._activate(path, source, p.Activation("sigmoid"))
            case nn.Tanh():
                return self._activate(path, source, p.Activation("tanh"))
            case nn.MaxPool2d() if not module.return_indices:
                return self._append(p.Pool(path, (source,), module, linear=False))
            case nn.AvgPool2d() | nn.AdaptiveAvgPool2d():
                return self._append(p.Pool(path, (source,), module, linear=True))
            case nn.Flatten() if module.start_dim >= 1:
                return self._append(p.Reshape(path, (source,), module))
            case nn.Dropout() | nn.Dropout2d():
                return self._append(p.Dropout(path, (source,), module))
            case nn.Identity():
                return source
        raise p.UnsupportedNode(f"{type(module).__name__} at {path!r} has no bound rule; supported: {SUPPORTED}")

    def _function(self, node: fx.Node) -> Any:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        first = first_operand(node)
        value = self.values.get(first) if isinstance(first, fx.Node) else first
        if name == "size" or (name == "getattr" and node.args[1] == "shape"):
            asked = node.args[1:] if name == "size" else ()
            return _BatchSize() if asked == (0,) else _Shape()
        if name == "getitem" and isinstance(value, _Shape) and node.args[1] == 0:
            return _BatchSize()
        if node.target in (operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul,
                           operator.truediv, operator.itruediv, torch.add, torch.sub, torch.mul, torch.div) or (
            node.op == "call_method" and name.rstrip("_") in ("add", "sub", "mul", "div")
        ):  # fmt: skip
            return self._arithmetic(node, name.rstrip("_").removeprefix("i").removeprefix("true"))
        if isinstance(value, _Constant) and name in _OF_CONSTANTS:
            return self._computed(node)
        if name in _FUNCTIONS:
            return _FUNCTIONS[name](self, node, self._position(node, first))
        raise p.UnsupportedNode(f"{name} at {node.name!r} has no bound rule; supported: {SUPPORTED}")

    def _computed(self, node: fx.Node) -> _Constant:
        """A constant made of constants, computed when it is asked for, because buffers may change."""
        arguments = [self.values[a] if isinstance(a, fx.Node) else a for a in node.args]
        if node.kwargs or any(
            type(a) is int and isinstance(n, fx.Node) for a, n in zip(arguments, node.args, strict=True)
        ):
            raise p.UnsupportedNode(f"{node.name!r}: accepted: a constant made of constants alone")

        def compute() -> Any:
            values = [a.value() if isinstance(a, _Constant) else a for a in arguments]
            if isinstance(node.target, str):
                return getattr(values[0], node.target)(*values[1:])
            return node.target(*values)  # type: ignore[operator]

        return _Constant(compute, computed=True)

    def _position(self, node: fx.Node, argument: Any) -> int:
        value = self.values.get(argument) if isinstance(argument, fx.Node) else argument
        if type(value) is not int or not isinstance(argument, fx.Node):
            raise p.UnsupportedNode(f"{node.name!r}: its input is not a tensor computed from the images")
        return value

    def _activate(self, path: str, source: int, activation: p.Activation) -> int:
        return self._append(p.Activate(path, (source,), activation))

    def _leaky(self, path: str, source: int, slope: float) -> int:
        if not 0 <= slope <= 1:
            raise p.UnsupportedNode(f"LeakyReLU at {path!r}: found slope {slope}; accepted: a slope in [0, 1]")
        return self._activate(path, source, p.Activation("leaky_relu", slope))

    def _arithmetic(self, node: fx.Node, kind: str) -> Any:
        if node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"} or len(node.args) != 2:
            raise p.UnsupportedNode(f"{kind} at {node.name!r}: accepted: two operands and no options")
        left, right = (self.values[a] if isinstance(a, fx.Node) else _Constant.number(a) for a in node.args)
        positions = [value for value in (left, right) if type(value) is int]
        if not positions:
            return self._computed(node)
        if len(positions) == 2 and kind in ("add", "sub"):
            return self._append(p.Add(node.name, (positions[0], positions[1]), 1.0 if kind == "add" else -1.0))
        constant = right if type(left) is int else left
        if len(positions) != 1 or not isinstance(constant, _Constant) or (kind == "div" and constant is left):
            raise p.UnsupportedNode(
                f"{kind} at {node.name!r} has no bound rule for these operands; supported: {SUPPORTED}"
            )
        coefficients: dict[str, p.Coefficients] = {
            "add": lambda: (1.0, constant.value()),
            "sub": lambda: (1.0, -constant.value()) if constant is right else (-1.0, constant.value()),
            "mul": lambda: (constant.value(), 0.0),
            "div": lambda: (1.0 / constant.value(), 0.0),
        }
        return self._append(p.Scale(node.name, (positions[0],), coefficients[kind]))


@dataclass(frozen=True, eq=False)
class _Constant:
    """A number, or a tensor looked up where it lives each time (``.to(device)`` replaces buffers)."""

    owner: Any
    name: str = ""
    computed: bool = False

    @classmethod
    def number(cls, value: Any) -> _Constant:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise p.UnsupportedNode(f"found the constant {value!r}; accepted: a number, a parameter or a buffer")
        return cls(value)

    def value(self) -> Any:
        if self.computed:
            return self.owner()
        return getattr(self.owner, self.name) if self.name else self.owner


def _reshape(tracing: _Tracing, node: fx.Node, source: int) -> int:
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    values = [tracing.values.get(size) if isinstance(size, fx.Node) else size for size in sizes]
    keeps_batch = values and (isinstance(values[0], _BatchSize) or (values[0] == -1 and -1 not in values[1:]))
    rest = [value for value in values[1:] if type(value) is int and not isinstance(value, fx.Node)]
    if not keeps_batch or len(rest) != len(values) - 1 or any(isinstance(size, fx.Node) for size in sizes[1:]):
        raise p.UnsupportedNode(
            f"{node.target} at {node.name!r}: found sizes {tuple(sizes)}; accepted: x.size(0) or -1 first, then numbers"
        )

    def apply(x: Tensor) -> Tensor:
        # with an empty batch -1 is ambiguous: work it out from the other entries
        known = math.prod(size for size in rest if size != -1)
        return x.reshape(x.shape[0], *(math.prod(x.shape[1:]) // known if size == -1 else size for size in rest))

    return tracing._append(p.Reshape(node.name, (source,), apply))


def _flatten(tracing: _Tracing, node: fx.Node, source: int) -> int:
    start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
    end: Any = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
    if not isinstance(start, int) or start < 1:
        raise p.UnsupportedNode(
            f"flatten at {node.name!r}: found start_dim={start}; accepted: 1 or more (keeps the batch)"
        )
    return tracing._append(p.Reshape(node.name, (source,), lambda x: x.flatten(start, end)))


def _pool(linear: bool):
    def rule(tracing: _Tracing, node: fx.Node, source: int) -> int:
        options, keywords = node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}
        function: Any = node.target
        if keywords.pop("return_indices", False):
            raise p.UnsupportedNode(f"{node.name!r}: max pooling that returns indices has no bound rule")
        if any(isinstance(option, fx.Node) for option in (*options, *keywords.values())):
            raise p.UnsupportedNode(f"{node.name!r}: a pool whose size depends on the images; accepted: numbers")
        return tracing._append(p.Pool(node.name, (source,), lambda x: function(x, *options, **keywords), linear))

    return rule


def _activation(kind: str):
    return lambda tracing, node, source: tracing._activate(node.name, source, p.Activation(kind))


def _functional_leaky(tracing: _Tracing, node: fx.Node, source: int) -> int:
    slope: Any = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
    return tracing._leaky(node.name, source, slope)


def _functional_dropout(tracing: _Tracing, node: fx.Node, source: int) -> int:
    raise p.UnsupportedNode(f"F.dropout at {node.name!r} freezes its mode when traced; accepted: nn.Dropout")


_OF_CONSTANTS = ("view", "reshape", "unsqueeze", "squeeze", "getitem", "exp", "sqrt", "reciprocal", "neg")

_FUNCTIONS: dict[str, Callable[[_Tracing, fx.Node, int], int]] = {
    "relu": _activation("relu"),
    "relu_": _activation("relu"),
    "sigmoid": _activation("sigmoid"),
    "tanh": _activation("tanh"),
    "leaky_relu": _functional_leaky,
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "max_pool2d": _pool(linear=False),
    "boolean_dispatch": _pool(linear=False),  # how torch names F.max_pool2d
    "avg_pool2d": _pool(linear=True),
    "adaptive_avg_pool2d": _pool(linear=True),
    "dropout": _functional_dropout,
    "contiguous": lambda tracing, node, source: source,
}
