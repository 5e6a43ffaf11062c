"""Layers called as functions, with weights of the model: linear layers, convolutions, transposed ones, batch norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ...typed import is_list, is_tuple
from .base import Function
from .batch_norm import BatchNorm
from .convolution import Convolution
from .linear import Dense
from .options import refuse
from .registry import Constant, EvaluationMode, Tracing, from_function
from .transposed_convolution import TransposedConvolution


@dataclass(frozen=True, eq=False)
class Operands:
    """The weight and bias of a function, looked up in the model at each use."""

    weights: Constant | None
    biases: Constant | None

    @property
    def weight(self) -> Tensor:
        return self._looked_up(self.weights)

    @property
    def bias(self) -> Tensor:
        return self._looked_up(self.biases)

    @staticmethod
    def _looked_up(constant: Constant | None) -> Any:
        return None if constant is None else constant.value()


class Arguments:
    """A function's arguments behind its input, by their names in torch, which are all that are accepted.

    Raises:
        UnsupportedOperation: an argument of another name.
    """

    def __init__(self, tracing: Tracing, node: fx.Node, *names: str):
        self.node = node
        given = {**dict(zip(names, node.args[1:])), **{k: v for k, v in node.kwargs.items() if k != "input"}}
        if given.keys() - set(names) or len(node.args) > 1 + len(names):
            refuse(node, f"arguments {', '.join(given)}", ", ".join(names))
        self.given = {k: tracing.values.get(v) if isinstance(v, fx.Node) else v for k, v in given.items()}

    def __getitem__(self, name: str) -> Any:
        """An argument as it is; None where it is left out."""
        return self.given.get(name)

    def constant(self, name: str) -> Constant | None:
        """A tensor of the model.

        Raises:
            UnsupportedOperation: it is computed from the images.
        """
        found = self[name]
        if not (found is None or isinstance(found, Constant)):
            refuse(self.node, f"{name} computed from the images", "parameters and buffers")
        return found

    def operands(self, *, needs_weight: bool = True) -> Operands:
        """The tensors ``weight`` and ``bias``.

        Raises:
            UnsupportedOperation: one is computed from the images; no weight where one is needed.
        """
        found = Operands(self.constant("weight"), self.constant("bias"))
        if needs_weight and found.weights is None:
            refuse(self.node, "no weight", "parameters and buffers")
        return found

    def number(self, name: str, missing: float) -> float:
        """
        Raises:
            UnsupportedOperation: no number.
        """
        found = missing if self[name] is None else self[name]
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            refuse(self.node, f"{name}={found}", "a number")
        return float(found)

    def sizes(self, name: str, missing: int, count: int) -> tuple[int, ...]:
        """One number for each of ``count`` dimensions.

        Raises:
            UnsupportedOperation: others, or no numbers.
        """
        value: Any = missing if self[name] is None else self[name]
        each = list(value) if is_tuple(value) or is_list(value) else [value]
        each = each * count if len(each) == 1 else each
        whole = [size for size in each if type(size) is int]
        if len(each) != count or len(whole) != count:
            refuse(self.node, f"{name}={value}", f"a number, or {count}")
        return tuple(whole)


def _places(node: fx.Node) -> int:
    return 1 if getattr(node.target, "__name__", "").endswith("1d") else 2


@from_function("linear")
def _linear(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Dense(node.name, (source,), Arguments(tracing, node, "weight", "bias").operands()))


@from_function("conv1d", "conv2d")
def _convolution(tracing: Tracing, node: fx.Node, source: int) -> int:
    given = Arguments(tracing, node, "weight", "bias", "stride", "padding", "dilation", "groups")
    stride, padding, dilation = (
        given.sizes(name, missing, _places(node)) for name, missing in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    (groups,) = given.sizes("groups", 1, 1)
    return tracing.append(Convolution(node.name, (source,), given.operands(), stride, padding, dilation, groups))


@from_function("conv_transpose1d", "conv_transpose2d")
def _transposed(tracing: Tracing, node: fx.Node, source: int) -> int:
    given = Arguments(tracing, node, "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    stride, padding, output_padding, dilation = (
        given.sizes(name, missing, _places(node))
        for name, missing in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    )
    (groups,) = given.sizes("groups", 1, 1)
    geometry = stride, padding, output_padding, groups, dilation
    return tracing.append(TransposedConvolution(node.name, (source,), given.operands(), *geometry))


@dataclass(frozen=True, eq=False)
class _RunningNorm:
    """The tensors of a batch norm that is called as a function."""

    mean: Constant
    variance: Constant
    operands: Operands
    eps: float

    training: ClassVar[bool] = False
    affine: ClassVar[bool] = False  # no module's parameters, which an initialisation would set

    @property
    def running_mean(self) -> Tensor:
        return self.mean.value()

    @property
    def running_var(self) -> Tensor:
        return self.variance.value()

    @property
    def weight(self) -> Tensor:
        return self.operands.weight

    @property
    def bias(self) -> Tensor:
        return self.operands.bias


@dataclass(frozen=True, eq=False)
class RunningBatchNorm(BatchNorm):
    """A batch norm that a function computes with running statistics, in every mode."""

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self)


@from_function("batch_norm")
def _batch_norm(tracing: Tracing, node: fx.Node, source: int) -> int:
    names = "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    given = Arguments(tracing, node, *names)
    if given["training"] not in (None, False) or isinstance(given["training"], EvaluationMode):
        refuse(node, "training=True, or one that follows the model's mode", "training=False, or nn.BatchNorm2d")
    mean, variance = given.constant("running_mean"), given.constant("running_var")
    if mean is None or variance is None:
        refuse(node, "no running statistics", "running_mean and running_var")
    norm: Any = _RunningNorm(mean, variance, given.operands(needs_weight=False), given.number("eps", 1e-5))
    return tracing.append(RunningBatchNorm(node.name, (source,), norm))
