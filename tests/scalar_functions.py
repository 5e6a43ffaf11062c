"""Functions of one number, a row each: the operation, the torch layer, the ONNX operator, and where they switch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from networks import Apply
from torch import Tensor, nn

from certtrain.bounds.operations import (
    Abs,
    Ceil,
    Celu,
    Clamp,
    Cos,
    Elu,
    Erf,
    Exp,
    Floor,
    Hardswish,
    Log,
    Mish,
    Operation,
    Power,
    Reciprocal,
    Round,
    Selu,
    Signum,
    Sin,
    Softplus,
    Softsign,
    Sqrt,
    ThresholdedRelu,
)

PI = math.pi


@dataclass(frozen=True)
class Row:
    """One function.

    Args:
        operation: on position 0; None where several operations make it.
        layers: in torch; all are the same function.
        op: the ONNX operator; None where there is none. inputs: further inputs, None for one left out.
        opsets: that give it these inputs and attributes.
        switches: places where its rule decides otherwise.
        above: its domain's lower end.
        exact: whether torch and onnxruntime give the same bits.
        linear: whether it is piecewise linear. jumps: whether it is discontinuous.
    """

    operation: Operation | None
    layers: tuple[Callable[[Tensor], Tensor], ...] = ()
    op: str | None = None
    inputs: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    opsets: tuple[int, ...] = (20,)
    switches: tuple[float, ...] = (0.0,)
    above: float = -math.inf
    exact: bool = False
    linear: bool = False
    jumps: bool = False


def function(apply: Callable[[Tensor], Tensor]) -> nn.Module:
    """A function of a tensor as a module."""
    return Apply(lambda module, x: apply(x))


def power(exponent: float, above: float = -math.inf, **more: Any) -> Row:
    kind = {0.5: Sqrt, -1.0: Reciprocal}.get(exponent) if more.pop("own", False) else None
    operation = Power("it", (0,), exponent) if kind is None else kind("it", (0,))
    inputs = () if kind else (np.float32(exponent),)
    layers = (lambda x: x**exponent, lambda x: torch.pow(x, exponent), lambda x: x.pow(exponent))
    own = {Sqrt: torch.sqrt, Reciprocal: torch.reciprocal}
    layers = layers if kind is None else (own[kind],)
    return Row(operation, layers, kind.__name__ if kind else "Pow", inputs, opsets=(8, 13, 15), above=above, **more)


SLOPES = np.array([0.3, -0.7, 1.8, 0.0, -1.0], np.float32)


def at(kind: type[Operation], *fields: Any) -> Operation:
    return kind("it", (0,), *fields)


ROWS: dict[str, Row] = {
    "exp": Row(at(Exp), (torch.exp, lambda x: x.exp()), "Exp", opsets=(8, 13)),
    "log": Row(at(Log), (torch.log, lambda x: x.log()), "Log", opsets=(8, 13), above=0.0, switches=(1e-3, 1.0)),
    "sqrt": power(0.5, 0.0, own=True, switches=(0.0, 1e-6, 1.0)),
    "reciprocal": power(-1.0, 0.0, own=True, switches=(1e-3, 1.0)),
    "square": power(2.0),
    "cube": power(3.0),
    "fourth": power(4.0),
    "power 2.5": power(2.5, 0.0, switches=(0.0, 1.0)),
    "power 0.3": power(0.3, 0.0, switches=(0.0, 1.0)),
    "power -0.5": power(-0.5, 0.0, switches=(1e-3, 1.0)),
    "power -2": power(-2.0, 0.0, switches=(1e-3, 1.0)),
    "power -3": power(-3.0, 0.0, switches=(1e-3, 1.0)),
    "power 1": Row(None, (lambda x: x**1,), "Pow", (np.int64(1),), opsets=(15,), linear=True),
    "erf": Row(at(Erf), (torch.erf, lambda x: x.erf(), torch.special.erf), "Erf", opsets=(9, 13)),
    "sin": Row(at(Sin), (torch.sin, lambda x: x.sin()), "Sin", opsets=(8, 20),
               switches=(-PI, -PI / 2, 0.0, PI / 2, PI, 2 * PI, 31 * PI, 4096.0)),
    "cos": Row(at(Cos), (torch.cos,), "Cos", opsets=(8,), switches=(-PI, -PI / 2, 0.0, PI / 2, PI, 1.5 * PI, -4096.0)),
    "softplus": Row(at(Softplus), (), "Softplus", opsets=(8, 20)),
    "softplus, thresholds": Row(at(Softplus, 1.0, 20.0), (nn.Softplus(), F.softplus), switches=(0.0, 20.0)),
    "softplus, low threshold": Row(at(Softplus, 2.0, 1.0), (nn.Softplus(2, 1), lambda x: F.softplus(x, 2, 1)),
                                   switches=(0.0, 0.5), jumps=True),
    "softsign": Row(at(Softsign), (nn.Softsign(), F.softsign), "Softsign", opsets=(8, 20)),
    "elu": Row(at(Elu), (nn.ELU(), F.elu), "Elu", opsets=(8, 20)),
    "elu 2.5": Row(at(Elu, 2.5), (nn.ELU(2.5), lambda x: F.elu(x, 2.5)), "Elu", attributes={"alpha": 2.5}),
    "celu": Row(at(Celu, 0.5), (nn.CELU(0.5), lambda x: F.celu(x, alpha=0.5)), "Celu", attributes={"alpha": 0.5},
                opsets=(12, 20)),
    "selu": Row(at(Selu), (nn.SELU(), F.selu), "Selu", opsets=(8, 20)),
    "selu, other constants": Row(at(Selu, 2.0, 3.0), (), "Selu", attributes={"alpha": 2.0, "gamma": 3.0}),
    "hard swish": Row(at(Hardswish), (nn.Hardswish(), F.hardswish), "HardSwish", opsets=(14, 20),
                      switches=(-3.0, -1.5, 0.0, 3.0)),
    "mish": Row(at(Mish), (nn.Mish(), F.mish), "Mish", opsets=(18,), switches=(-2.256376, -1.19245, 0.0, 1.490571)),
    "thresholded relu": Row(at(ThresholdedRelu, 1.0), (nn.Threshold(1, 0),), "ThresholdedRelu", opsets=(10, 20),
                            switches=(0.0, 1.0), jumps=True),
    "threshold": Row(at(ThresholdedRelu, -1.0, 0.5), (nn.Threshold(-1, 0.5), lambda x: F.threshold(x, -1, 0.5)),
                     switches=(-1.0, 0.5), jumps=True),
    "floor": Row(at(Floor), (torch.floor, lambda x: x.floor()), "Floor", opsets=(8, 13), exact=True, jumps=True,
                 switches=(-1.0, 0.0, 1.0, 7.0)),
    "ceil": Row(at(Ceil), (torch.ceil,), "Ceil", opsets=(8, 13), exact=True, jumps=True,
                switches=(-1.0, 0.0, 1.0, 7.0)),
    "round": Row(at(Round), (torch.round, lambda x: x.round()), "Round", opsets=(11,), exact=True, jumps=True,
                 switches=(-1.5, -0.5, 0.5, 1.5, 2.5, 6.5)),
    "sign": Row(at(Signum), (torch.sign, lambda x: x.sign()), "Sign", opsets=(9, 13), exact=True, jumps=True),
    "abs": Row(at(Abs), (torch.abs, abs, lambda x: x.abs()), "Abs", opsets=(8, 13), exact=True, linear=True),
    "neg": Row(None, (torch.neg, lambda x: -x), "Neg", exact=True, linear=True),
    "relu6": Row(at(Clamp, 0.0, 6.0), (nn.ReLU6(), F.relu6, lambda x: x.clamp(0, 6)), "Clip",
                 (np.float32(0), np.float32(6)), opsets=(11, 13), exact=True, linear=True, switches=(0.0, 6.0)),
    "hardtanh": Row(at(Clamp, -0.3, 1.2), (nn.Hardtanh(-0.3, 1.2), lambda x: F.hardtanh(x, -0.3, 1.2)), "Clip",
                    attributes={"min": -0.3, "max": 1.2}, opsets=(8, 10), exact=True, linear=True,
                    switches=(-0.3, 1.2)),
    "clip below": Row(at(Clamp, 0.5), (lambda x: x.clamp(min=0.5), lambda x: torch.clamp_min(x, 0.5)), "Clip",
                      (np.float32(0.5),), opsets=(11, 13), exact=True, linear=True, switches=(0.5,)),
    "clip above": Row(at(Clamp, -math.inf, 0.5), (lambda x: torch.clamp(x, max=0.5),), "Clip", (None, np.float32(0.5)),
                      opsets=(11, 13), exact=True, linear=True, switches=(0.5,)),
    "clip crossed": Row(at(Clamp, 1.0, 0.5), (lambda x: x.clamp(1.0, 0.5),), "Clip", (np.float32(1), np.float32(0.5)),
                        opsets=(13,), exact=True, linear=True, switches=(0.5, 1.0)),
    "clip by none": Row(at(Clamp), (), "Clip", opsets=(10, 13), exact=True, linear=True),
    "max": Row(None, (), "Max", (np.float32(0.25), np.float32(-1)), opsets=(8, 13), exact=True, linear=True),
    "min": Row(None, (), "Min", (np.float32(0.25),), opsets=(8, 13), exact=True, linear=True),
    "max of a row": Row(None, (), "Max", (SLOPES,), opsets=(13,), linear=True),
    "min of a row": Row(None, (), "Min", (SLOPES,), opsets=(13,), linear=True),
    "hard sigmoid": Row(None, (nn.Hardsigmoid(), F.hardsigmoid), "HardSigmoid", attributes={"alpha": 1 / 6},
                        opsets=(8, 20), linear=True),
    "hard sigmoid, default": Row(None, (), "HardSigmoid", linear=True),
    "prelu": Row(None, (nn.PReLU(5, init=-0.4), nn.PReLU(), nn.PReLU(init=1.7)), "PRelu", (SLOPES,), opsets=(9, 16),
                 linear=True),
    "prelu of one slope": Row(None, (), "PRelu", (np.float32([0.25]),), opsets=(16,), linear=True),
}  # fmt: skip
CURVES = {name: row for name, row in ROWS.items() if row.operation is not None}
