"""A network as a program: a list of nodes in which layer, batch norm and activation are one fused node.

The program is structure only. It refers to the model's own layers, so it follows their weights, and it is
interpreted by small rules: ``forward.py`` (plain values) and ``ibp.py`` (intervals). ``tracing.py`` makes it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..errors import InputError
from .activation import Activation

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
Convolution = nn.Conv1d | nn.Conv2d


class UnsupportedNode(InputError):
    """The model contains an operation that has no rule; the message names it and what is supported."""


@dataclass(frozen=True, eq=False)
class Node:
    """One step. ``inputs`` are positions in the program, of which 0 is the network's input."""

    path: str
    inputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Input(Node):
    """The images."""


@dataclass(frozen=True, eq=False)
class Affine(Node):
    """Linear, Conv1d or Conv2d, then perhaps batch norm, then perhaps an activation."""

    layer: nn.Linear | Convolution
    norm: BatchNorm | None = None
    activation: Activation | None = None


@dataclass(frozen=True, eq=False)
class Norm(Node):
    """A batch norm that follows no affine layer, then perhaps an activation."""

    norm: BatchNorm
    activation: Activation | None = None


@dataclass(frozen=True, eq=False)
class Activate(Node):
    """An activation that follows no affine layer."""

    activation: Activation


@dataclass(frozen=True, eq=False)
class Pool(Node):
    """A pooling layer over the last dimensions, so many; monotone in every entry. ``linear`` for averages."""

    function: Callable[[Tensor], Tensor]
    linear: bool
    dimensions: int = 2


@dataclass(frozen=True, eq=False)
class Reshape(Node):
    """A rearrangement of each sample's entries, or of some of them."""

    function: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Add(Node):
    """Sum (``sign`` 1) or difference (-1) of two nodes: residual connections."""

    sign: float = 1.0


@dataclass(frozen=True, eq=False)
class Concat(Node):
    """Nodes one after the other along a dimension, counted with the batch; negative ones from the end."""

    dim: int

    def along(self, rank: int) -> int:
        """The dimension of tensors that have ``rank`` of them.

        Raises:
            UnsupportedNode: it is the batch, or there is no such dimension.
        """
        dim = self.dim + rank if self.dim < 0 else self.dim
        if not 1 <= dim < rank:
            raise UnsupportedNode(
                f"cat at {self.path!r}: found dim={self.dim} of {rank} dimensions; accepted: one behind the batch"
            )
        return dim


Coefficients = Callable[[], tuple[Tensor | float, Tensor | float]]
"""(scale, shift), looked up each time: buffers are replaced when a model moves."""


@dataclass(frozen=True, eq=False)
class Scale(Node):
    """Elementwise ``scale * x + shift`` with constants of the model (numbers, parameters or buffers).

    Two in a row stay two: one in their place, in float32, would be another network (x + 8192 - 8192 is not x).

    Args:
        exact: the same in float64, where the model's own dtype would round them.
        roundings: that the network makes of one output at most, in float32, relative to |scale x| + |shift|.
    """

    coefficients: Coefficients
    exact: Coefficients | None = None
    roundings: int = 2

    def __call__(self, x: Tensor) -> Tensor:
        scale, shift = self.coefficients()  # a number is looked at, a tensor never: that would wait for a GPU
        x = x if isinstance(scale, float) and scale == 1 else x * scale
        return x if isinstance(shift, float) and shift == 0 else x + shift

    def radius(self, radius: Tensor) -> Tensor:
        """Of an interval, given its radius before."""
        scale, _ = self.coefficients()
        return radius if isinstance(scale, float) and abs(scale) == 1 else radius * abs(scale)


@dataclass(frozen=True, eq=False)
class Dropout(Node):
    """Dropout; bounds enclose the evaluation network, where it does nothing."""

    module: nn.Module


@dataclass(frozen=True, eq=False)
class Whole(Node):
    """A module that is run, and not looked into; ``why`` it cannot be bounded."""

    module: nn.Module
    why: UnsupportedNode


@dataclass(frozen=True, eq=False)
class Program:
    """Nodes in an order in which every input comes first; the last one is the output."""

    nodes: tuple[Node, ...]
    signature: object = None  # of the model that it was traced from: see tracing.py

    def last_use(self) -> list[int]:
        """For each node the position of the last node that reads it: its value may be dropped afterwards."""
        last = list(range(len(self.nodes)))
        for position, node in enumerate(self.nodes):
            for read in node.inputs:
                last[read] = position
        return last

    def __reduce__(self):
        return (_nothing, ())  # a copied or pickled model is traced anew


def _nothing() -> None:
    return None


class ProgramModule(nn.Module):
    """A network that is its program from the start: what the readers of network files make.

    Args:
        nodes: as of a ``Program``, fused or not; the last one gives the output. What it does not need is left out.
    """

    def __init__(self, nodes: list[Node]):
        super().__init__()
        self.nodes = nodes
        needed = _needed(nodes)
        self.program = Program(fuse(needed, len(needed) - 1))
        self.layers = nn.ModuleList(  # of the nodes as given
            module for node in nodes for module in vars(node).values() if isinstance(module, nn.Module)
        )
        self.eval()

    def __deepcopy__(self, memo: dict) -> ProgramModule:
        return ProgramModule(copy.deepcopy(self.nodes, memo))

    def forward(self, x: Tensor) -> Tensor:
        from .forward import forward  # which asks for the program of a module, this one for instance

        return forward(self, x).logits


def _needed(nodes: list[Node]) -> list[Node]:
    """Those that the last one depends on, and the input."""
    wanted = {0, len(nodes) - 1}
    for number in range(len(nodes) - 1, 0, -1):
        wanted |= set(nodes[number].inputs) if number in wanted else set()
    place = {old: new for new, old in enumerate(sorted(wanted))}
    return [replace(nodes[old], inputs=tuple(place[read] for read in nodes[old].inputs)) for old in place]


def fuse(nodes: list[Node], output: int) -> tuple[Node, ...]:
    """Merge batch norms and activations into the node that they alone read; ``output`` comes last."""
    readers = Counter(read for node in nodes for read in node.inputs)
    readers[output] += 1
    fused: list[Node] = []
    position: list[int] = []  # of each node of ``nodes`` in ``fused``
    for node in nodes:
        inputs = tuple(position[read] for read in node.inputs)
        alone = len(inputs) == 1 and readers[node.inputs[0]] == 1
        merged = _merged(fused[inputs[0]], node) if alone else None
        if merged is not None:
            fused[inputs[0]] = merged
            position.append(inputs[0])
        else:
            fused.append(replace(node, inputs=inputs))
            position.append(len(fused) - 1)
    if position[output] != len(fused) - 1:
        fused.append(Reshape("output", (position[output],), lambda x: x))
    return tuple(fused)


def _merged(first: Node, second: Node) -> Node | None:
    """The two as one node, if there is such a node."""
    if isinstance(second, Norm) and isinstance(first, Affine) and not first.norm and not first.activation:
        return replace(first, norm=second.norm)
    if isinstance(second, Activate) and isinstance(first, (Affine, Norm)) and not first.activation:
        return replace(first, activation=second.activation)
    return None
