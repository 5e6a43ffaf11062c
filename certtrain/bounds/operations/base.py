"""What an operation of a network must bring along. Each is one class in one file of this folder.

An operation is frozen and knows the positions of its inputs, of which 0 is the network's input. It evaluates itself on
values, on intervals and on linear bounds. A missing rule is a type error: all are abstract here, or stand below with
what most operations want.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..interval import Bounds, Interval
from ..relaxation import InputLines, Relaxation
from ..window import Window


class UnsupportedNode(InputError):
    """The model contains an operation that has no rule; the message names it and what is supported."""


@dataclass(frozen=True, eq=False)
class Operation(ABC):
    """One step of a network.

    Values are (B, *shape), intervals and bounds of them alike, linear forms (B, R, *shape); a ``shape`` is one without
    B. Rules that take ``*inputs`` get one for each of the operation's inputs.

    Args:
        path: the layer's name in the model, or the operator's in a file.
        inputs: positions in the network.
    """

    path: str
    inputs: tuple[int, ...]

    entrywise_map: ClassVar[bool] = False
    """Each entry is a * (one entry of the image) + b, no entry twice, in the image's order."""

    @abstractmethod
    def __call__(self, *inputs: Any, **_: Any) -> Tensor:
        """Evaluate at tensors (B, *shape)."""

    @abstractmethod
    def interval(self, *inputs: Any, **_: Any) -> Interval:
        """Bound the image of a box, given an ``Interval`` of each input; differentiable."""

    @abstractmethod
    def backward(
        self, forms: Tensor, constants: Tensor, shapes: Sequence[torch.Size], relaxation: Relaxation | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Carry lower bounds from the output to the inputs, as ``Relaxation.backward``.

        Args:
            shapes: of the inputs. relaxation: of a non-linear operation, over the inputs' bounds.
        """

    @abstractmethod
    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        """Carry lines over the network's input from the inputs to the output."""

    @abstractmethod
    def magnitude(self, *inputs: Any, **_: Any) -> Tensor:
        """|W| |x| + |b|, given |x|: what roundings are relative to, and no partial sum exceeds."""

    @abstractmethod
    def roundings(self, shape: torch.Size) -> int:
        """Roundings that an evaluation makes of one output at most, given the first input's shape; 0 if it copies."""

    def terms(self, shape: torch.Size) -> int:
        """How many products the output, or the adjoint, sums up at most, given the first input's shape."""
        return 1

    def peak(self, *inputs: Tensor) -> Tensor:
        """The largest number that an evaluation meets, partial results included, given |x|."""
        return self.magnitude(*inputs)

    def work(self, numbers: int) -> int:
        """Multiplications, about, for so many numbers of the output, forward or backward."""
        return ENTRYWISE * numbers

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window | None:
        """The window of its inputs that a window of its output depends on; None where it is not local.

        Args:
            shapes: of the output and of each input, all (C, H, W).
        """
        return None

    def on_windows(self) -> Operation:
        """The operation as it acts on windows, which bring their padding along."""
        return self

    @abstractmethod
    def module(self, shape: torch.Size) -> nn.Module:
        """A module that computes the same with the same weights, bit for bit, for the ONNX exporter.

        Args:
            shape: of the first input.
        """

    @abstractmethod
    def fold(self, folding: Folding, *sources: int) -> int:
        """Append what it becomes in a folded network, at ``sources``, to ``folding``; the position of the result."""


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

    def finite(self, found: Tensor, path: str) -> Tensor:
        """The tensor itself.

        Raises:
            UnsupportedNode: it holds NaN or infinity.
        """
        ...


ENTRYWISE = 8
"""Multiplications that an operation without products takes as long as, for each number."""


class Linear(Operation):
    """An affine map of its inputs, with its adjoint."""

    @abstractmethod
    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        """Linear forms (B, R, *shape) of the output as forms of each input, whose ``shapes`` are given."""

    def constant(self, forms: Tensor) -> Tensor | float:
        """What the map's constant adds to forms of its output, (B, R)."""
        return 0.0

    def backward(
        self, forms: Tensor, constants: Tensor, shapes: Sequence[torch.Size], relaxation: Relaxation | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        return self.adjoints(forms, *shapes), constants + self.constant(forms)

    def fold(self, folding: Folding, *sources: int) -> int:
        return folding.append(replace(self, inputs=sources))


class Nonlinear(Operation):
    """A function that linear bounds replace by a relaxation of it."""

    kind: ClassVar[str]
    """Its name in messages."""

    @property
    @abstractmethod
    def piecewise_linear(self) -> bool:
        """Whether it is max(x, kink x) entry by entry: branch and bound is complete for those."""

    @property
    def kink(self) -> float:
        """The slope left of 0 of a piecewise linear one; on the right it is 1."""
        return 0.0

    @abstractmethod
    def relax(self, *bounds: Any, alpha: Tensor | None = None) -> Relaxation:
        """A relaxation over ``Bounds`` of each input.

        Args:
            alpha: free parameters in [0, 1], if it has any: (B, *shape) or (B, R, *shape). None chooses them.
        """

    def open(self, *bounds: Bounds) -> list[Tensor]:
        """The entries of each input, (B, *shape) bool, whose bounds are worth tightening for a better relaxation."""
        return [x.lower < x.upper for x in bounds]

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
    """An operation that linear bounds never meet: folding replaces it, or nothing bounds it."""

    @abstractmethod
    def refusal(self) -> UnsupportedNode:
        """Why there are no linear bounds of it."""

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
class Input(Linear):
    """The images."""

    entrywise_map: ClassVar[bool] = True

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def interval(self, x: Interval) -> Interval:
        return x

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        return (forms,)

    def forward_lines(self, inputs: Sequence[InputLines], relaxation: Relaxation | None) -> InputLines:
        return inputs[0]

    def magnitude(self, x: Tensor) -> Tensor:
        return x

    def roundings(self, shape: torch.Size) -> int:
        return 0

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Identity()


class Function(nn.Module):
    """A function as a module, for the exporter."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def summed_onto(forms: Tensor, shape: torch.Size) -> Tensor:
    """Forms of values that were broadcast from ``shape``, as forms of those: they add up."""
    return forms.sum_to_size(*forms.shape[:2], *shape)
