"""Gradients by hand where torch's own would cost passes over memory that the formula does not need.

Measured on 2 CPU cores, CNN7 at CIFAR size: its 512×32768 linear weight is 97 % of all parameters, so that every
elementwise pass over it (|W| kept for backward, sign, product, sum) costs as much as a convolution.
Each function has its plain twin in ``reference.py``. Second derivatives are not supported and raise.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 20
"""Entries of |W| that are alive at a time on the CPU. Each fresh 64 MB tensor costs more in page faults than the
arithmetic on it: whole |W| and sign(W) made forward + backward of CNN7 1.8 times as slow at B = 8."""


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, with a buffer of that shape which is used again for the next one."""
    rows, columns = weight.shape
    size = rows if weight.is_cuda else min(rows, BLOCK // max(columns, 1))
    size = max(size, 1)
    buffer = weight.new_empty(size, columns)
    for first in range(0, rows, size):
        part = slice(first, min(first + size, rows))
        yield part, buffer[: part.stop - first]


class IbpMatmul(torch.autograd.Function):
    """(W c, |W| r); |W| is taken where it is used and not saved."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(center, radius, weight)
        product = radius.new_empty(*radius.shape[:-1], len(weight))
        for part, buffer in _blocks(weight):
            product[..., part] = F.linear(radius, torch.abs(weight[part], out=buffer))
        return F.linear(center, weight), product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor):
        center, radius, weight = ctx.saved_tensors
        rows, columns = weight.shape
        for_center = grad_center @ weight if ctx.needs_input_grad[0] else None
        from_radius, from_center = grad_radius.reshape(-1, rows), grad_center.reshape(-1, rows)
        for_radius = for_weight = None
        if ctx.needs_input_grad[1]:
            for_radius = radius.new_zeros(from_radius.shape[0], columns)
            for part, buffer in _blocks(weight):
                for_radius.addmm_(from_radius[:, part], torch.abs(weight[part], out=buffer))
            for_radius = for_radius.reshape(radius.shape)
        if ctx.needs_input_grad[2]:
            for_weight = torch.empty_like(weight)
            flat_center, flat_radius = center.reshape(-1, columns), radius.reshape(-1, columns)
            for part, buffer in _blocks(weight):
                block = for_weight[part]
                torch.mm(from_radius[:, part].T, flat_radius, out=block)
                block.mul_(torch.sign(weight[part], out=buffer))
                block.addmm_(from_center[:, part].T, flat_center)
        return for_center, for_radius, for_weight


class IbpRelu(torch.autograd.Function):
    """Both ends through max(., 0); the backward needs only where each end is positive."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = (center - radius).clamp_(min=0), (center + radius).clamp_(min=0)
        ctx.save_for_backward(lower > 0, upper > 0)
        new_radius = (upper - lower).mul_(0.5)
        return upper.add_(lower).mul_(0.5), new_radius

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_center: Tensor, grad_radius: Tensor):
        lower_on, upper_on = ctx.saved_tensors
        to_upper = (grad_center + grad_radius).mul_(0.5).mul_(upper_on)
        to_lower = (grad_center - grad_radius).mul_(0.5).mul_(lower_on)
        for_radius = to_upper - to_lower
        return to_upper.add_(to_lower), for_radius
