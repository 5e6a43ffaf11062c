"""Activations that are smooth on each of a few pieces: softplus, softsign, ELU and its kin, hard swish, mish, and the
thresholded ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .base import Function, UnsupportedOperation
from .curves import INFINITY, Formula, Piece, ScalarCurve, halved
from .registry import Tracing, entrywise, from_function, from_module, number


def _same(x: Tensor) -> Tensor:
    return x


def _one(x: Tensor) -> Tensor:
    return torch.ones_like(x)


def _zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def line(start: float, end: float, value: Formula = _same, slope: Formula = _one) -> Piece:
    """A straight piece."""
    return Piece(start, end, 0, value, slope)


@dataclass(frozen=True, eq=False)
class Softplus(ScalarCurve):
    """log(1 + exp(beta x)) / beta, and x where beta x exceeds the threshold, as torch computes it.

    Raises:
        UnsupportedOperation: beta is not positive, or the threshold is NaN.
    """

    beta: float = 1.0
    threshold: float = INFINITY

    kind: ClassVar[str] = "softplus"
    error: ClassVar[float] = 4

    def __post_init__(self) -> None:
        if not (0 < self.beta < INFINITY and self.threshold == self.threshold):
            found = f"beta={self.beta}, threshold={self.threshold}"
            raise UnsupportedOperation(f"Softplus at {self.path!r}: found {found}; accepted: beta > 0 and a threshold")

    def value(self, x: Tensor) -> Tensor:
        if self.threshold == INFINITY:
            return torch.logaddexp(x * self.beta, torch.zeros_like(x)) / self.beta
        return F.softplus(x, self.beta, self.threshold)

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.maximum(lower.abs(), upper.abs()).clamp(min=max(1.0, 1 / self.beta))

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        beta, switch = self.beta, self.threshold / self.beta
        left = Piece(
            -INFINITY, switch, 1, lambda x: torch.logaddexp(x * beta, torch.zeros_like(x)) / beta,
            lambda x: torch.sigmoid(x * beta), lambda slope: torch.logit(slope) / beta,
        )  # fmt: skip
        return (left,) if switch == INFINITY else (left, line(switch, INFINITY))

    def module(self, shape: torch.Size) -> nn.Module:
        return Function(self.value) if self.threshold == INFINITY else nn.Softplus(self.beta, self.threshold)


@dataclass(frozen=True, eq=False)
class Softsign(ScalarCurve):
    """x / (1 + |x|)."""

    kind: ClassVar[str] = "softsign"
    error: ClassVar[float] = 4
    rises: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        return F.softsign(x)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        def slope(x: Tensor) -> Tensor:
            return (1 + x.abs()).square().reciprocal()

        def right(slope: Tensor) -> Tensor:
            return slope.rsqrt() - 1

        return (
            Piece(-INFINITY, 0.0, 1, self.value, slope, lambda s: -right(s)),
            Piece(0.0, INFINITY, -1, self.value, slope, right),
        )

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Softsign()


@dataclass(frozen=True, eq=False)
class Elu(ScalarCurve):
    """x right of 0, alpha (exp(x) - 1) left of it.

    Raises:
        UnsupportedOperation: alpha is not positive.
    """

    alpha: float = 1.0

    kind: ClassVar[str] = "elu"
    error: ClassVar[float] = 4
    rises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha < INFINITY:
            raise UnsupportedOperation(
                f"{type(self).__name__} at {self.path!r}: found alpha={self.alpha}; accepted: a number > 0"
            )

    @property
    def scales(self) -> tuple[float, float, float]:
        """(a, b, c): a x right of 0, b (exp(c x) - 1) left of it."""
        return 1.0, self.alpha, 1.0

    def value(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The kernels' errors are roundings of alpha, of alpha exp(c x), or of what is right of 0."""
        return super().size(lower, upper).clamp(min=max(self.scales))

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        right, left, inner = self.scales
        return (
            Piece(
                -INFINITY, 0.0, 1, lambda x: left * torch.expm1(inner * x),
                lambda x: left * inner * torch.exp(inner * x), lambda slope: (slope / (left * inner)).log() / inner,
            ),
            line(0.0, INFINITY, lambda x: right * x, lambda x: torch.full_like(x, right)),
        )  # fmt: skip

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.ELU(self.alpha)


@dataclass(frozen=True, eq=False)
class Celu(Elu):
    """x right of 0, alpha (exp(x / alpha) - 1) left of it."""

    kind: ClassVar[str] = "celu"

    @property
    def scales(self) -> tuple[float, float, float]:
        return 1.0, self.alpha, 1 / self.alpha

    def value(self, x: Tensor) -> Tensor:
        return F.celu(x, self.alpha)

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.CELU(self.alpha)


@dataclass(frozen=True, eq=False)
class Selu(Elu):
    """gamma x right of 0, gamma alpha (exp(x) - 1) left of it."""

    alpha: float = 1.6732632423543772848170429916717
    gamma: float = 1.0507009873554804934193349852946

    kind: ClassVar[str] = "selu"

    @property
    def scales(self) -> tuple[float, float, float]:
        return self.gamma, self.gamma * self.alpha, 1.0

    def value(self, x: Tensor) -> Tensor:
        return F.selu(x) if self.standard else self.gamma * F.elu(x, self.alpha)

    @property
    def standard(self) -> bool:
        """Whether the constants are torch's, up to ONNX's rounding of them to float32."""
        known = zip((self.alpha, self.gamma), (Selu.alpha, Selu.gamma), strict=True)
        return all(abs(own - wanted) < 1e-7 for own, wanted in known)

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.SELU() if self.standard else Function(self.value)


@dataclass(frozen=True, eq=False)
class Hardswish(ScalarCurve):
    """x clip(x / 6 + 1/2, 0, 1): 0, a parabola on [-3, 3], and x."""

    kind: ClassVar[str] = "hardswish"
    error: ClassVar[float] = 4

    def value(self, x: Tensor) -> Tensor:
        return F.hardswish(x)

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        return upper.clamp(min=3)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        parabola = Piece(
            -3.0, 3.0, 1, lambda x: x * (x + 3) / 6, lambda x: (2 * x + 3) / 6, lambda slope: (6 * slope - 3) / 2
        )
        return (line(-INFINITY, -3.0, _zero, _zero), parabola, line(3.0, INFINITY))

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Hardswish()


def _mish_slope(x: Tensor) -> Tensor:
    gate = torch.tanh(F.softplus(x))
    return gate + x * (1 - gate * gate) * torch.sigmoid(x)


MISH_BENDS = -2.25637639639607931, 1.49057117948542846
"""Roots of mish's second derivative: concave left of the first and right of the second."""


@dataclass(frozen=True, eq=False)
class Mish(ScalarCurve):
    """x tanh(log(1 + exp(x)))."""

    kind: ClassVar[str] = "mish"
    error: ClassVar[float] = 4

    def value(self, x: Tensor) -> Tensor:
        return F.mish(x)

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.maximum(lower.abs(), upper.abs()).clamp(min=1)

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        first, last = MISH_BENDS
        return (
            Piece(-INFINITY, first, -1, self.value, _mish_slope, halved(_mish_slope, first, -60.0)),
            Piece(first, last, 1, self.value, _mish_slope, halved(_mish_slope, first, last)),
            Piece(last, INFINITY, -1, self.value, _mish_slope, halved(_mish_slope, 60.0, last)),
        )

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Mish()


@dataclass(frozen=True, eq=False)
class ThresholdedRelu(ScalarCurve):
    """x above ``alpha``, else ``otherwise``: in general with a jump, whose ends both count as values.

    Raises:
        UnsupportedOperation: a number is not finite.
    """

    alpha: float
    otherwise: float = 0.0

    kind: ClassVar[str] = "thresholded_relu"
    error: ClassVar[float] = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and math.isfinite(self.otherwise)):
            raise UnsupportedOperation(
                f"threshold at {self.path!r}: found {self.alpha} and {self.otherwise}; accepted: finite numbers"
            )

    def value(self, x: Tensor) -> Tensor:
        return F.threshold(x, self.alpha, self.otherwise)

    def size(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.maximum(lower.abs(), upper.abs()).clamp(min=max(1.0, abs(self.otherwise)))

    def pieces(self, lower: Tensor, upper: Tensor) -> Sequence[Piece]:
        constant = line(-INFINITY, self.alpha, lambda x: torch.full_like(x, self.otherwise), _zero)
        return (constant, line(self.alpha, INFINITY))

    def module(self, shape: torch.Size) -> nn.Module:
        return nn.Threshold(self.alpha, self.otherwise)


@from_module(nn.Softplus)
def _softplus(tracing: Tracing, path: str, source: int, module: nn.Softplus) -> int:
    return tracing.append(Softplus(path, (source,), float(module.beta), float(module.threshold)))


@from_function("softplus")
def _softplus_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    numbers = number(node, 1, "beta", 1.0), number(node, 2, "threshold", 20.0)
    return tracing.append(Softplus(node.name, (source,), *numbers))


@from_module(nn.ELU)
def _elu(tracing: Tracing, path: str, source: int, module: nn.ELU) -> int:
    return tracing.append(Elu(path, (source,), float(module.alpha)))


@from_function("elu", "elu_")
def _elu_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Elu(node.name, (source,), number(node, 1, "alpha", 1.0)))


@from_module(nn.CELU)
def _celu(tracing: Tracing, path: str, source: int, module: nn.CELU) -> int:
    return tracing.append(Celu(path, (source,), float(module.alpha)))


@from_function("celu", "celu_")
def _celu_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    return tracing.append(Celu(node.name, (source,), number(node, 1, "alpha", 1.0)))


@from_module(nn.Threshold)
def _threshold(tracing: Tracing, path: str, source: int, module: nn.Threshold) -> int:
    return tracing.append(ThresholdedRelu(path, (source,), float(module.threshold), float(module.value)))


@from_function("threshold", "_threshold", "threshold_")
def _threshold_function(tracing: Tracing, node: fx.Node, source: int) -> int:
    numbers = number(node, 1, "threshold"), number(node, 2, "value")
    return tracing.append(ThresholdedRelu(node.name, (source,), *numbers))


@from_module(nn.Softsign, nn.SELU, nn.Hardswish, nn.Mish)
def _plain(tracing: Tracing, path: str, source: int, module: nn.Module) -> int:
    kind = next(kind for torch_kind, kind in _PLAIN.items() if isinstance(module, torch_kind))
    return tracing.append(kind(path, (source,)))


_PLAIN: dict[type[nn.Module], type[ScalarCurve]] = {
    nn.Softsign: Softsign, nn.SELU: Selu, nn.Hardswish: Hardswish, nn.Mish: Mish,
}  # fmt: skip
from_function("softsign")(entrywise(Softsign))
from_function("selu", "selu_")(entrywise(Selu))
from_function("hardswish")(entrywise(Hardswish))
from_function("mish")(entrywise(Mish))
