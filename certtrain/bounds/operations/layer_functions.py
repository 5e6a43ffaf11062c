"""Layers called as functions, with weights of the model: ``F.linear``, ``F.conv1d`` and ``F.conv2d``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from ...typed import is_list, is_tuple
from .convolution import Convolution
from .linear import Dense
from .options import refuse
from .registry import Constant, Tracing, from_function


@dataclass(frozen=True, eq=False)
class _Operands:
    """The weights of a function, looked up in the model at each use."""

    weights: Constant
    biases: Constant | None

    @property
    def weight(self) -> Tensor:
        return self.weights.value()

    @property
    def bias(self) -> Tensor | None:
        return None if self.biases is None else self.biases.value()


def _operands(tracing: Tracing, node: fx.Node) -> _Operands:
    """The arguments ``weight`` and ``bias`` behind a function's input.

    Raises:
        UnsupportedOperation: one of them is computed from the images.
    """
    given = dict(zip(("weight", "bias"), node.args[1:])) | {k: v for k, v in node.kwargs.items() if k != "input"}
    weight, bias = (tracing.values.get(one) if isinstance(one, fx.Node) else one
                    for one in (given.get("weight"), given.get("bias")))  # fmt: skip
    if not isinstance(weight, Constant) or not (bias is None or isinstance(bias, Constant)):
        refuse(node, "a weight or a bias that is computed from the images", "parameters and buffers")
    return _Operands(weight, bias)


@from_function("linear")
def _linear(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Dense(node.name, (source,), _operands(tracing, node)))


@from_function("conv1d", "conv2d")
def _convolution(tracing: Tracing, node: fx.Node, source: int) -> int:
    layer, places = _operands(tracing, node), 1 if getattr(node.target, "__name__", "") == "conv1d" else 2
    names = "stride", "padding", "dilation", "groups"
    given = dict(zip(names, node.args[3:])) | {name: node.kwargs[name] for name in names if name in node.kwargs}
    sizes: list[tuple[int, ...]] = []
    for name, missing in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = given.get(name, missing)
        each = list(value) if is_tuple(value) or is_list(value) else [value]
        each = each * places if len(each) == 1 else each
        whole = [size for size in each if type(size) is int]
        if len(each) != places or len(whole) != places:
            refuse(node, f"{name}={value}", f"a number, or {places}")
        sizes.append(tuple(whole))
    stride, padding, dilation = sizes
    groups = given.get("groups", 1)
    if type(groups) is not int:
        refuse(node, f"groups={groups}", "a number")
    return tracing.append(Convolution(node.name, (source,), layer, stride, padding, dilation, groups))
