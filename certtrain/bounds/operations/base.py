"""Base classes of a network's operations; each operation is one class in one file of this folder.

An operation is frozen and knows the positions of its inputs; position 0 is the network's input. It evaluates values,
intervals and linear bounds. Rules are abstract here or have a default that suits most operations, so that a missing
rule is a type error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..interval import Bounds, Interval
from ..relaxation import InputLines, Relaxation
from ..window import Window


class UnsupportedOperation(InputError):
    """The model contains an operation without a rule; the message names it and the supported ones."""


@dataclass(frozen=True, eq=False)
class Operation(ABC):
    """One step of a network.

    Values, intervals and bounds are (B, *shape), linear forms (B, R, *shape); a ``shape`` excludes B. ``*inputs`` are
    one argument per input of the operation.

    Args:
        path: the layer's name in the model, or the operator's in a file.
        inputs: positions of its inputs in the network.
    """

    path: str
    inputs: tuple[int, ...]

    entrywise_map: ClassVar[bool] = False
    """Whether each output entry is a * x + b of one entry x of the image, without repeats and in the image's order."""
    partial: ClassVar[bool] = False
    """Whether its output may be infinite or have no value at inputs of moderate size: ``peak`` does not tell then."""

    @abstractmethod
    def __call__(self, *inputs: Any, **_: Any) -> Tensor:
        """Evaluate at tensors (B, *shape)."""

    @abstractmethod
    def interval(self, *inputs: Any, **_: Any) -> Interval:
        """Bound the output over an ``Interval`` of each input; differentiable."""

    @abstractmethod
    def backward(
        self, forms: Tensor, constants: Tensor, shapes: Sequence[torch.Size], relaxation: Relaxation | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Carry lower bounds from the output to the inputs, as ``Relaxation.backward`` does.

        Args:
            shapes: of the inputs.
            relaxation: for non-linear operations, over the inputs' bounds.
        """

    @abstractmethod
    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        """Carry lines, which are functions of the network's input, from the inputs to the output."""

    @abstractmethod
    def magnitude(self, *inputs: Any, **_: Any) -> Tensor:
        """|W| |x| + |b|, given |x|: the scale of rounding errors, which no partial sum exceeds."""

    @abstractmethod
    def roundings(self, shape: torch.Size) -> int:
        """Largest number of roundings in one output's evaluation, given the first input's shape; 0 for copies."""

    def terms(self, shape: torch.Size) -> int:
        """Largest number of products in a sum of the output or the adjoint, given the first input's shape."""
        return 1

    def peak(self, *inputs: Tensor) -> Tensor:
        """Upper bound of all numbers in an evaluation, partial results included, given |x|."""
        return self.magnitude(*inputs)

    def work(self, numbers: int) -> int:
        """Approximate multiplications for ``numbers`` numbers of the output, forward or backward."""
        return ENTRYWISE * numbers

    def entries(self, *numbers: Tensor) -> Tensor | None:
        """The number (1, *shape) of the input entry that each output entry is an increasing or falling function of, 0
        for a constant, given the entries' ``numbers``; None where an output may depend on several."""
        return None

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        """The window of its inputs that a window of its output depends on; None if the operation is not local.

        Args:
            shapes: of the output and of each input, all (C, H, W).
        """
        return None

    def on_windows(self) -> Operation:
        """The operation as it acts on windows, which include their padding."""
        return self

    @abstractmethod
    def module(self, shape: torch.Size) -> nn.Module:
        """A module that computes the operation bit for bit with the same weights, for ONNX export.

        Args:
            shape: of the first input.
        """

    def change(self, other: Any, graph: Graph, values: Sequence[int], changes: Sequence[int | None]) -> int | None:
        """Append other(values + changes) - self(values), of two folded operations; return its position, or None if it
        is 0 everywhere.

        Args:
            other: an operation of the same class.
            values, changes: positions in ``graph`` of the inputs and of what is added to them, None for 0.
        Raises:
            UnsupportedOperation: the difference has no rule.
        """
        raise UnsupportedOperation(
            f"{self.path}: found {type(self).__name__} in a difference of networks; accepted: two alike, with a rule"
        )

    @abstractmethod
    def fold(self, folding: Folding, *sources: int) -> int:
        """Append its folded form, with inputs at ``sources``, to ``folding``; return the position of the result."""


class Graph(Protocol):
    """A folded network that grows.

    Args:
        shapes: of the operations so far, without the batch dimension.
    """

    shapes: list[torch.Size]

    def append(self, operation: Operation) -> int:
        """Add an operation, whose inputs are positions in the network; returns its own."""
        ...

    def zeros(self, value: int) -> int:
        """The position of zeros in the shape of the value at a position."""
        ...

    def difference(self, first: Tensor, second: Tensor) -> Tensor:
        """The second constant minus the first.

        Raises:
            UnsupportedOperation: it has to be exact, and is not.
        """
        ...


class Folding(Protocol):
    """A folded network that grows: what ``Operation.fold`` appends to.

    Args:
        shapes: of the operations so far, without the batch dimension.
        device: of the model.
        as_written: the operators of a network file stay what they are.
        whole_pools: max pools stay as they are.
    """

    shapes: list[torch.Size]
    device: torch.device
    as_written: bool
    whole_pools: bool

    def append(self, operation: Operation) -> int:
        """Add an operation, whose inputs are positions in the folded network; returns its own."""
        ...

    def tensor(self, value: Tensor | float, path: str) -> Tensor:
        """A constant in the model's dtype, and then in that of the folded network."""
        ...

    def finite(self, weight: Tensor, path: str) -> Tensor:
        """The tensor itself.

        Raises:
            UnsupportedOperation: it holds NaN or infinity.
        """
        ...


ENTRYWISE = 8
"""Work per number, in multiplications, of an operation without products."""


class LinearOperation(Operation):
    """An affine map of its inputs, with its adjoint."""

    @abstractmethod
    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        """Linear forms (B, R, *shape) of the output as forms of each input, given the inputs' ``shapes``."""

    def constant(self, forms: Tensor) -> Tensor | float:
        """The map's constant term in forms of its output, (B, R)."""
        return 0.0

    def backward(
        self, forms: Tensor, constants: Tensor, shapes: Sequence[torch.Size], relaxation: Relaxation | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        return self.adjoints(forms, *shapes), constants + self.constant(forms)

    def fold(self, folding: Folding, *sources: int) -> int:
        return folding.append(replace(self, inputs=sources))


class Nonlinear(Operation):
    """A function that linear bounds replace by a relaxation."""

    kind: ClassVar[str]
    """Its name in messages."""

    @property
    @abstractmethod
    def piecewise_linear(self) -> bool:
        """Whether it is max(x, kink x) entry by entry, for which branch and bound is complete."""

    @property
    def rounding_is_bounded(self) -> bool:
        """Whether ``magnitude`` covers the roundings of its relaxation, as other arithmetics than nearest need."""
        return self.piecewise_linear

    @property
    def kink(self) -> float:
        """The slope left of 0 of a piecewise linear function; right of 0 it is 1."""
        return 0.0

    @abstractmethod
    def relax(self, *bounds: Any, alpha: Tensor | None = None) -> Relaxation:
        """A relaxation over ``Bounds`` of each input.

        Args:
            alpha: free parameters, where ``adjustable``: (B, *shape) or (B, R, *shape), of the output's shape. Values
                in [0, 1], clipped to these; the lower slopes of piecewise linear functions, else 1/2 is as None, the
                default.
        """

    @property
    def adjustable(self) -> bool:
        """Whether ``relax`` takes one free parameter for each number of the output."""
        return self.piecewise_linear

    def adjusted(self, relaxation: Relaxation, bounds: Sequence[Bounds], alpha: Tensor) -> Relaxation:
        """The default ``relaxation`` over ``bounds`` of each input, with other parameters (B, R, *shape); those of
        piecewise linear functions are the lower slopes themselves."""
        return self.relax(*bounds, alpha=alpha)

    def open(self, *bounds: Bounds) -> list[Tensor]:
        """(B, *shape) bool for each input: the entries for which tighter bounds improve the relaxation."""
        return [x.lower < x.upper for x in bounds]

    def unstable(self, *bounds: Bounds) -> list[Tensor]:
        """(B, *shape) bool for each input: the entries that count as unstable neurons; by default those of either sign.
        The fewer there are, the more backward passes pay."""
        return [(x.lower < 0) & (x.upper > 0) for x in bounds]

    def backward(
        self, forms: Tensor, constants: Tensor, shapes: Sequence[torch.Size], relaxation: Relaxation | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        assert relaxation is not None
        return relaxation.backward(forms, constants)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        assert relaxation is not None
        return relaxation.forward(*inputs)

    def fold(self, folding: Folding, *sources: int) -> int:
        return folding.append(replace(self, inputs=sources))


class Unbounded(Operation):
    """An operation without linear bounds: folding replaces it, or it has no bounds at all."""

    @abstractmethod
    def refusal(self) -> UnsupportedOperation:
        """The error for a request of linear bounds."""

    def backward(
        self, forms: Tensor, constants: Tensor, shapes: Sequence[torch.Size], relaxation: Relaxation | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        raise self.refusal()

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        raise self.refusal()

    def magnitude(self, *inputs: Any, **_: Any) -> Tensor:
        raise self.refusal()

    def roundings(self, shape: torch.Size) -> int:
        raise self.refusal()


@dataclass(frozen=True, eq=False)
class Input(LinearOperation):
    """The network's input, a batch of images."""

    entrywise_map: ClassVar[bool] = True

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def interval(self, x: Interval) -> Interval:
        return x

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        return (forms,)

    def entries(self, *numbers: Tensor) -> Tensor:
        return numbers[0]

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        return inputs[0]

    def magnitude(self, x: Tensor) -> Tensor:
        return x

    def roundings(self, shape: torch.Size) -> int:
        return 0

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Identity()


class Function(nn.Module):
    """A function as a module, for ONNX export."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def alike(first: Operation, second: Operation, *besides: str) -> bool:
    """Whether two operations of one class agree in all fields but their names, inputs and ``besides``."""
    names = {field.name for field in fields(first)} - {"path", "inputs", *besides}
    return all(getattr(first, name) == getattr(second, name) for name in names)


def summed_onto(forms: Tensor, shape: torch.Size) -> Tensor:
    """Forms of values broadcast from ``shape``, summed to forms (B, R, *shape) of the values before the broadcast."""
    return forms.sum_to_size(*forms.shape[:2], *shape)


def clipped(alpha: Tensor, least: float = 0.0) -> Tensor:
    """Parameters clipped to [least, 1], with the gradient of the identity: clamp's own is 0 at its ends, where ascents
    start and arrive."""
    return alpha.clamp(least, 1.0).detach() + (alpha - alpha.detach())
