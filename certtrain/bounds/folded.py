"""The network as it is certified: batch norms folded into weights, activations apart, weights as tensors.

Its operations are few: linear ones, each with its adjoint, and entrywise non-linear ones. Max pooling is rewritten as
ReLUs, max(a, b) = b + relu(a - b). Linear relaxation, branch and bound, LP and MILP all work on this form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from . import convolution
from . import program as p
from .interval import Interval

if TYPE_CHECKING:
    from .rounding import Rounding


@dataclass(frozen=True, eq=False)
class Operation:
    """One step. ``inputs`` are positions in the network, of which 0 is its input.

    Each evaluates itself on values and on intervals; linear ones have an adjoint. For bounds of rounding, ``magnitude``
    is |W| |x| + |b| given |x|, ``roundings`` how many an evaluation makes of one output (0 if it copies), and ``terms``
    how many products its output or its adjoint's sums at most; both given the input's shape.
    """

    path: str
    inputs: tuple[int, ...]

    def roundings(self, shape: torch.Size) -> int:
        return 0

    def terms(self, shape: torch.Size) -> int:
        return 1


@dataclass(frozen=True, eq=False)
class Input(Operation):
    """The images."""


@dataclass(frozen=True, eq=False)
class Dense(Operation):
    """weight (H, D) times the last dimension, plus bias (H,)."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def interval(self, x: Interval) -> Interval:
        return Interval(*kernels.ibp_linear(x.center, x.radius, self.weight, self.bias))

    def adjoint(self, forms: Tensor, shape: torch.Size) -> Tensor:
        return forms @ self.weight

    def constant(self, forms: Tensor) -> Tensor | float:
        if self.bias is None:
            return 0.0
        return (forms.flatten(2, -2).sum(2) if forms.ndim > 3 else forms) @ self.bias

    def magnitude(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), _absolute(self.bias))

    def roundings(self, shape: torch.Size) -> int:
        return self.weight.shape[1] + 1

    def terms(self, shape: torch.Size) -> int:
        return max(self.weight.shape) + 1


@dataclass(frozen=True, eq=False)
class Convolution(Operation):
    """A zero-padded convolution of weight (K, C / groups, h, w) or (K, C / groups, length), plus bias (K,)."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def geometry(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        return self.stride, self.padding, self.dilation, self.groups

    def __call__(self, x: Tensor) -> Tensor:
        return convolution.convolve(x, self.weight, self.bias, *self.geometry)

    def interval(self, x: Interval) -> Interval:
        return convolution.interval(x, self.weight, self.bias, *self.geometry)

    def adjoint(self, forms: Tensor, shape: torch.Size) -> Tensor:
        flat = convolution.transposed(forms.flatten(0, 1), self.weight, shape, *self.geometry)
        return flat.reshape(*forms.shape[:2], *flat.shape[1:])

    def constant(self, forms: Tensor) -> Tensor | float:
        return 0.0 if self.bias is None else forms.flatten(3).sum(3) @ self.bias

    def magnitude(self, x: Tensor) -> Tensor:
        return convolution.convolve(x, self.weight.abs(), _absolute(self.bias), *self.geometry)

    def roundings(self, shape: torch.Size) -> int:
        return self.weight[0].numel() + 1

    def terms(self, shape: torch.Size) -> int:
        return max(self.weight[0].numel(), self.weight[:, 0].numel() // self.groups) + 1


@dataclass(frozen=True, eq=False)
class Diagonal(Operation):
    """scale * x + shift, entry by entry; both broadcast against (1, *shape). The network makes ``rounds`` roundings."""

    scale: Tensor
    shift: Tensor
    rounds: int = 2

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift

    def interval(self, x: Interval) -> Interval:
        center = self(x.center)
        return Interval(center, (x.radius * self.scale.abs()).expand_as(center))

    def adjoint(self, forms: Tensor, shape: torch.Size) -> Tensor:
        return _onto(forms * self.scale, shape)

    def constant(self, forms: Tensor) -> Tensor:
        return (forms * self.shift).flatten(2).sum(-1)

    def magnitude(self, x: Tensor) -> Tensor:
        return x * self.scale.abs() + self.shift.abs()

    def roundings(self, shape: torch.Size) -> int:
        return self.rounds


@dataclass(frozen=True, eq=False)
class Rearrangement(Operation):
    """A linear map without constant: a reshape, padding, an average; ``reorders`` if it adds nothing up."""

    function: Callable[[Tensor], Tensor]
    reorders: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def interval(self, x: Interval) -> Interval:
        return Interval(self.function(x.center), self.function(x.radius).abs())  # an average's divisor may be negative

    def adjoint(self, forms: Tensor, shape: torch.Size) -> Tensor:
        with torch.enable_grad():
            point = forms.new_zeros(forms.shape[0] * forms.shape[1], *shape, requires_grad=True)
            (found,) = torch.autograd.grad(
                self.function(point), point, forms.flatten(0, 1), create_graph=forms.requires_grad
            )
        return found.reshape(*forms.shape[:2], *shape)

    def constant(self, forms: Tensor) -> float:
        return 0.0

    def magnitude(self, x: Tensor) -> Tensor:
        return self.function(x).abs()

    def roundings(self, shape: torch.Size) -> int:
        return 0 if self.reorders else shape[-2:].numel() + 1

    def terms(self, shape: torch.Size) -> int:
        return shape.numel() + 1


@dataclass(frozen=True, eq=False)
class Opaque(Operation):
    """Whatever can be evaluated, but not bounded; asked for more it raises ``why``."""

    function: Callable[[Tensor], Tensor]
    why: p.UnsupportedNode

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def _refuse(self, *_: object) -> NoReturn:
        raise self.why

    interval = adjoint = constant = magnitude = _refuse

    def roundings(self, shape: torch.Size) -> NoReturn:
        raise self.why

    def terms(self, shape: torch.Size) -> NoReturn:
        raise self.why


@dataclass(frozen=True, eq=False)
class Sum(Operation):
    """The first input plus ``sign`` times the second; ``largest``: of two positions, if it is their maximum."""

    sign: float
    largest: tuple[int, int] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.sign * y

    def magnitude(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def roundings(self, shape: torch.Size) -> int:
        return 1

    def interval(self, x: Interval, y: Interval) -> Interval:
        return Interval(x.center + self.sign * y.center, x.radius + y.radius)

    def adjoints(self, forms: Tensor, first: torch.Size, second: torch.Size) -> tuple[Tensor, Tensor]:
        return _onto(forms, first), _onto(self.sign * forms, second)


@dataclass(frozen=True, eq=False)
class Concat(Operation):
    """All inputs one after the other along a dimension, counted with the batch, which is 0."""

    dim: int

    def __call__(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, self.dim)

    magnitude = __call__

    def interval(self, *parts: Interval) -> Interval:
        return Interval(self(*(x.center for x in parts)), self(*(x.radius for x in parts)))

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        return forms.split([shape[self.dim - 1] for shape in shapes], self.dim + 1)


def _onto(forms: Tensor, shape: torch.Size) -> Tensor:
    """Forms of values that were broadcast from ``shape``, as forms of those: they add up."""
    return forms.sum_to_size(*forms.shape[:2], *shape)


@dataclass(frozen=True, eq=False)
class Nonlinear(Operation):
    """An activation, entry by entry."""

    activation: p.Activation

    def magnitude(self, x: Tensor) -> Tensor:
        return x

    def roundings(self, shape: torch.Size) -> int:
        return 0 if self.activation.kind == "relu" else 2  # the slope's own, and the product's

    def __call__(self, x: Tensor) -> Tensor:
        return self.activation(x)

    def interval(self, x: Interval) -> Interval:
        return self.activation.interval(x)


def _absolute(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.abs()


@dataclass(frozen=True, eq=False)
class Folded:
    """Operations in an order in which inputs come first; the last one gives the logits (B, K).

    ``shapes`` are those of the operations' outputs, without the batch dimension. With a ``rounding`` (float64 weights)
    all bounds hold in the arithmetic that it describes, whatever float64 rounds on the way.
    """

    operations: tuple[Operation, ...]
    shapes: tuple[torch.Size, ...]
    rounding: Rounding | None = None

    @cached_property
    def nonlinear(self) -> tuple[int, ...]:
        """Positions of the non-linear operations."""
        return tuple(i for i, operation in enumerate(self.operations) if isinstance(operation, Nonlinear))

    @property
    def piecewise_linear(self) -> bool:
        return all(self.operations[i].activation.piecewise_linear for i in self.nonlinear)  # type: ignore[attr-defined]

    def operation(self, number: int) -> Operation:
        return self.operations[number]

    def shape(self, number: int, read: int) -> torch.Size:
        """Of what an operation reads."""
        return self.shapes[read]

    def __call__(self, images: Tensor) -> Tensor:
        return self.values(images)[-1]

    def values(self, images: Tensor) -> list[Tensor]:
        """Every operation's output at ``images`` (B, *shape)."""
        values = [images]
        for operation in self.operations[1:]:
            values.append(operation(*(values[read] for read in operation.inputs)))  # type: ignore[operator]
        return values
