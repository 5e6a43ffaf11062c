"""Activations by name, as operations of a network that read its input."""

from torch import Tensor

from certtrain.bounds import Bounds
from certtrain.bounds.operations import Entrywise, Gelu, GeluTanh, LeakyRelu, Relu, Sigmoid, Silu, Tanh
from certtrain.bounds.relaxation import Lines

TROUGHS = {kind.kind: kind.trough for kind in (Gelu, GeluTanh, Silu)}


def by_name(kind: str, slope: float = 0.0) -> Entrywise:
    if kind == "leaky_relu":
        return LeakyRelu("activation", (0,), slope)
    kinds = {kind.kind: kind for kind in (Relu, Sigmoid, Tanh, Gelu, GeluTanh, Silu)}
    return kinds[kind]("activation", (0,))


def relax(function: Entrywise, lower: Tensor, upper: Tensor, alpha: Tensor | None = None) -> Lines:
    return function.relax(Bounds(lower, upper), alpha=alpha)
