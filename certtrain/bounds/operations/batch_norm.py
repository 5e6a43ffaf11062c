"""Batch norms: with the batch's statistics in training, otherwise an affine map per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ... import kernels
from ..interval import Interval
from .base import Folding, Unbounded, UnsupportedOperation
from .registry import Tracing, from_module
from .scale import Constants, Scale


@dataclass(frozen=True)
class BatchStatistics:
    """Mean and *biased* variance per channel of one batch norm's input, each (C,), with their gradients."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class BatchNorm(Unbounded):
    """A batch norm of a model, over dimension 1. Folding merges it into the layer before it, or makes it a ``Scale``.

    Args:
        statistics: of a batch, used instead of the running ones.
    """

    norm: nn.BatchNorm1d | nn.BatchNorm2d
    statistics: BatchStatistics | None = None

    @property
    def learns(self) -> bool:
        """Whether it uses its input batch's statistics, and updates the running ones."""
        return self.norm.training and self.statistics is None

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (C,), from ``statistics`` or the running ones."""
        norm, statistics = self.norm, self.statistics
        if statistics is None:
            if norm.running_mean is None or norm.running_var is None:
                raise UnsupportedOperation(
                    "a batch norm without running statistics; accepted: track_running_stats=True"
                )
            statistics = BatchStatistics(norm.running_mean, norm.running_var)
        scale = torch.rsqrt(statistics.variance + norm.eps)
        weight, bias = self._affine()
        if weight is not None:
            scale = scale * weight
        shift = -statistics.mean * scale
        return scale, shift if bias is None else shift + bias

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        return self.norm.weight, self.norm.bias  # None without affine, which torch's types leave out

    def __call__(self, x: Tensor) -> Tensor:
        scale, shift = (values.reshape(-1, *[1] * (x.ndim - 2)) for values in self.coefficients())
        return x * scale + shift

    def of_batch(self, x: Tensor, ops: ModuleType = kernels) -> tuple[Tensor, BatchStatistics]:
        """The output with the batch's own statistics, and these statistics; updates the running ones as torch does.

        Args:
            ops: ``kernels``, or ``kernels.reference``, which is differentiable twice.
        """
        y, mean, variance = ops.batch_statistics_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        self._update(mean, variance, x.numel() // x.shape[1])
        return y, BatchStatistics(mean, variance)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        norm = self.norm
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            return
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.detach(), momentum)
        norm.running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)  # torch keeps the unbiased variance

    def interval(self, x: Interval) -> Interval:
        return Interval(*kernels.ibp_affine(x.center, x.radius, *self.coefficients()))

    def refusal(self) -> UnsupportedOperation:
        return UnsupportedOperation(
            f"BatchNorm at {self.path!r}: found it in linear bounds; accepted: a folded network"
        )

    def module(self, shape: torch.Size) -> nn.Module:
        return self.norm

    def fold(self, folding: Folding, *sources: int) -> int:
        (source,) = sources
        rest = [1] * (len(folding.shapes[source]) - 1)
        if folding.as_written:
            return self._as_operators(folding, source, rest)
        scale, shift = (folding.tensor(v, self.path).reshape(1, -1, *rest) for v in self.coefficients())
        return folding.append(Scale(self.path, sources, Constants(scale, shift)))

    def _as_operators(self, folding: Folding, source: int, rest: Sequence[int]) -> int:
        """The batch norm as two scales, (x - mean) times s, plus bias, with constants in float64.

        onnxruntime 1.31 evaluates x s + (bias - mean s) with a rounded s = weight / sqrt(variance + epsilon), whose
        error acts on x - mean only. In addition x is rounded twice, mean three times and bias twice. The error of s is
        4 roundings at most if its four steps round correctly; 8 are allowed for.
        """
        norm = self.norm
        mean, variance, weight, bias = (
            folding.finite(torch.as_tensor(value, dtype=torch.float64, device=folding.device), self.path)
            for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        vectors = -mean, weight / (variance + norm.eps).sqrt(), bias
        negative, scale, shift = (v.reshape(1, -1, *rest) for v in vectors)
        centred = Constants(torch.ones_like(negative), negative)
        place = folding.append(Scale(self.path, (source,), centred, rounds=3))
        scaled = Constants(folding.finite(scale, self.path), shift)
        return folding.append(Scale(self.path, (place,), scaled, rounds=8))


@from_module(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(tracing: Tracing, path: str, source: int, module: nn.BatchNorm1d | nn.BatchNorm2d) -> int:
    return tracing.append(BatchNorm(path, (source,), module))
