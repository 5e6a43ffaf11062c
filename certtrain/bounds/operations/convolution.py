"""Convolutions in one and two dimensions, distinguished by their weights' number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import kernels
from ...typed import reversed_padding
from ..interval import Interval
from ..region import Region
from ..window import Window, pair
from .affine import Affine, absolute, with_weights
from .base import UnsupportedOperation
from .rearrangement import Rearrangement
from .registry import Tracing, from_module

Sizes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Convolution(Affine):
    """A zero-padded convolution of weight (K, C / groups, h, w) or (K, C / groups, length), plus bias (K,)."""

    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int

    @property
    def geometry(self) -> tuple[Sizes, Sizes, Sizes, int]:
        """(stride, padding, dilation, groups), as torch's functions take them."""
        return self.stride, self.padding, self.dilation, self.groups

    def __call__(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.weight, self.bias)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._check(x, weight)
        function = F.conv1d if weight.ndim == 3 else F.conv2d
        return function(x, weight, bias, *self.geometry)

    def _check(self, x: Tensor, weight: Tensor) -> None:
        """Refuse an input without batch dimension, which torch would take for one image."""
        if x.ndim != weight.ndim:
            name, accepted = (
                ("Conv1d", "(B, channels, length)") if weight.ndim == 3 else ("Conv2d", "(B, channels, height, width)")
            )
            raise UnsupportedOperation(f"{name} at {self.path!r}: found {x.ndim} dimensions; accepted: {accepted}")

    def fused(
        self, x: Interval, scale: Tensor | None = None, shift: Tensor | None = None, *, relu: bool = False
    ) -> Interval:
        weight, (stride, padding, dilation, groups) = self.weight, self.geometry
        self._check(x.center, weight)
        flat = weight.ndim == 3
        if flat:  # as an image of one row
            x, weight = x.map(lambda t: t.unsqueeze(2)), weight.unsqueeze(2)
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        output = Interval(
            *kernels.ibp_conv2d(
                x.center, x.radius, weight, self.bias, stride, padding, dilation, groups,
                scale=scale, shift=shift, relu=relu,
            )
        )  # fmt: skip
        return output.map(lambda t: t.squeeze(2)) if flat else output

    def over_set(self, region: Region, hull: Interval, scale: Tensor, shift: Tensor) -> Interval:
        where = (
            f"{'Conv1d' if self.weight.ndim == 3 else 'Conv2d'} at {self.path!r} as the first layer over {region.kind}"
        )
        if self.groups != 1:
            raise UnsupportedOperation(f"{where}: found groups={self.groups}; accepted: groups=1")
        if not region.has_windows:
            raise UnsupportedOperation(f"{where} of patches: accepted: a Linear, or pixels, features, rows and columns")
        weight, constant = self.weight, self(shift)
        if weight.ndim == 4:
            return self._over_windows(region, weight, scale, constant)
        output = self._over_windows(region, *(x.unsqueeze(2) for x in (weight, scale, constant)))
        return output.map(lambda x: x.squeeze(2))

    def _over_windows(self, region: Region, weight: Tensor, scale: Tensor, constant: Tensor) -> Interval:
        """The output interval by forms (B·L, K, C, h, w) over windows (B·L, C, h, w); padding has coefficient 0."""
        count, images = len(region), region.images
        shape, kernel = (images.shape[1], *weight.shape[2:]), weight.shape[2:]

        def unfold(x: Tensor) -> Tensor:
            """(N, C, H, W) → (N, L, C·h·w), the L windows of each image."""
            walk = [(missing, *sizes)[-2:] for sizes, missing in
                    ((self.dilation, 1), (self.padding, 0), (self.stride, 1))]  # fmt: skip
            return F.unfold(x, tuple(kernel), *walk).transpose(1, 2)

        def cut(x: Tensor) -> Tensor:
            return unfold(x if x.ndim == 4 else x.unsqueeze(2)).reshape(-1, *shape)

        forms = unfold(scale).unsqueeze(2) * weight.flatten(1)  # (1, L, K, C·h·w)
        forms = forms.expand(count, -1, -1, -1).reshape(-1, len(weight), *shape)
        image = torch.arange(count, device=images.device).repeat_interleave(constant.shape[2:].numel())
        places = region.windows(image, cut)
        lower, upper = (
            end.reshape(-1, *constant.shape[2:], end.shape[1]).permute(0, 3, 1, 2)  # (B·L, K) → (B, K, H', W')
            for end in (places.concretise(forms), -places.concretise(-forms))
        )
        return Interval.from_bounds(lower + constant, torch.maximum(lower, upper) + constant)

    def adjoints(self, forms: Tensor, *shapes: torch.Size) -> tuple[Tensor, ...]:
        weight, shape, flat = self.weight, shapes[0], forms.flatten(0, 1)
        function = F.conv_transpose1d if weight.ndim == 3 else F.conv_transpose2d
        rest = [
            size - ((out - 1) * s - 2 * pad + d * (kernel - 1) + 1)
            for size, out, s, pad, d, kernel in zip(
                shape[1:], flat.shape[2:], self.stride, self.padding, self.dilation, weight.shape[2:], strict=True
            )
        ]
        if self._patches and not any(rest):  # 3 to 13 times as fast on patches of 4×4, by the number of channels
            adjoint = torch.einsum("nohw,ocij->nchiwj", flat, weight).reshape(len(flat), *shape)
        else:
            adjoint = function(flat, weight, None, self.stride, self.padding, rest, self.groups, self.dilation)
        return (adjoint.reshape(*forms.shape[:2], *adjoint.shape[1:]),)

    @property
    def _patches(self) -> bool:
        """Whether it cuts an image into patches of several pixels, next to each other."""
        kernel, plain = tuple(self.weight.shape[2:]), self.groups == 1 and not any(self.padding)
        return plain and self.weight.ndim == 4 and kernel == self.stride != (1, 1) and set(self.dilation) == {1}

    def constant(self, forms: Tensor) -> Tensor | float:
        return 0.0 if self.bias is None else forms.flatten(3).sum(3) @ self.bias

    def magnitude(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.weight.abs(), absolute(self.bias))

    def roundings(self, shape: torch.Size) -> int:
        return self.weight[0].numel() + 1

    def terms(self, shape: torch.Size) -> int:
        return max(self.weight[0].numel(), self.weight[:, 0].numel() // self.groups) + 1

    def work(self, numbers: int) -> int:
        return numbers * self.weight[0].numel()

    def window(self, window: Window, shapes: Sequence[torch.Size]) -> Window:
        walk = self.stride, self.padding, self.dilation, self.weight.shape[2:]
        return Window(
            pair(j * s for j, s in zip(window.jump, self.stride, strict=True)),
            pair(a * s - p for a, s, p, _, _ in zip(window.start, *walk, strict=True)),
            pair((n - 1) * s + d * (k - 1) + 1 for n, s, _, d, k in zip(window.size, *walk, strict=True)),
        )

    def on_windows(self) -> Convolution:
        return replace(self, padding=(0, 0))

    def module(self, shape: torch.Size) -> nn.Module:
        outputs, inputs, *kernel = self.weight.shape
        kind: Any = nn.Conv1d if len(kernel) == 1 else nn.Conv2d
        layer = kind(inputs * self.groups, outputs, tuple(kernel), *self.geometry, device="meta")
        return with_weights(layer, self.weight, self.bias)


@from_module(nn.Conv1d, nn.Conv2d)
def _convolution(tracing: Tracing, path: str, source: int, module: nn.Conv1d | nn.Conv2d) -> int:
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        around = reversed_padding(module)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        if any(around):
            source = tracing.append(Rearrangement(path, (source,), lambda x: F.pad(x, around, mode=mode)))
        padding = (0,) * (module.weight.ndim - 2)
    geometry = tuple(module.stride), tuple(padding), tuple(module.dilation), module.groups
    return tracing.append(Convolution(path, (source,), module, *geometry))
