"""Linear layers: a matrix times the last dimension, plus a bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import kernels
from ..interval import Interval
from ..region import Region
from .affine import Affine, absolute, concretised, with_weights
from .base import UnsupportedOperation
from .registry import Tracing, from_module


@dataclass(frozen=True, eq=False)
class Dense(Affine):
    """weight (H, D) times the last dimension, plus bias (H,)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def takes_norm(self, dimensions: int) -> bool:
        return dimensions == 2  # a batch norm's channels are dimension 1

    def fused(
        self, x: Interval, scale: Tensor | None = None, shift: Tensor | None = None, *, relu: bool = False
    ) -> Interval:
        layer = self.layer
        ends = kernels.ibp_linear(x.center, x.radius, layer.weight, layer.bias, scale=scale, shift=shift, relu=relu)
        return Interval(*ends)

    def over_set(self, region: Region, hull: Interval, scale: Tensor, shift: Tensor) -> Interval:
        images = region.images
        if hull.center.ndim != 2:
            raise UnsupportedOperation(
                f"Linear at {self.path!r}: found {hull.center.ndim} dimensions; accepted: (B, features)"
            )
        forms = (self.weight * scale).reshape(1, len(self.weight), *images.shape[1:])
        return concretised(region, forms.expand(len(images), *forms.shape[1:]), self(shift))

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        return (forms @ self.weight,)

    def constant(self, forms: Tensor) -> Tensor | float:
        if self.bias is None:
            return 0.0
        return (forms.flatten(2, -2).sum(2) if forms.ndim > 3 else forms) @ self.bias

    def magnitude(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), absolute(self.bias))

    def roundings(self, shape: torch.Size) -> int:
        return self.weight.shape[1] + 1

    def terms(self, shape: torch.Size) -> int:
        return max(self.weight.shape) + 1

    def work(self, numbers: int) -> int:
        return numbers * self.weight.shape[1]

    def module(self, shape: torch.Size) -> nn.Module:
        outputs, inputs = self.weight.shape
        return with_weights(nn.Linear(inputs, outputs, device="meta"), self.weight, self.bias)


@from_module(nn.Linear)
def _linear(tracing: Tracing, path: str, source: int, module: nn.Linear) -> int:
    return tracing.append(Dense(path, (source,), module))
