"""The cases of ``benchmark_kernels.py``: each op against other implementations, on shapes from practice.

A case is a name, a shape and its contenders: functions without arguments that return tensors. ``certtrain`` is the op;
``eager`` and ``compiled`` are its plain formula; the others are forms in use today (``kernel_rivals``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import kernel_rivals as rivals
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain import kernels

Contender = Callable[[], Tensor | Sequence[Tensor]]
reference = kernels.reference


@dataclass(frozen=True)
class Case:
    """One op and its contenders.

    ``leaves`` get gradients; without any there is no backward pass. ``touched`` is the number of bytes that an ideal
    kernel reads and writes in its forward pass, where memory traffic is the floor."""

    op: str
    shape: str
    contenders: dict[str, Contender]
    leaves: list[Tensor] = field(default_factory=list)
    touched: int = 0
    notes: list[str] = field(default_factory=list)


class Maker:
    """Random tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: str, compiled: bool):
        self.dtype, self.device, self.compiled = dtype, device, compiled
        torch.manual_seed(0)

    def normal(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device).requires_grad_(grad)

    def uniform(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.rand(shape, dtype=self.dtype, device=self.device).requires_grad_(grad)

    def labels(self, count: int, classes: int) -> Tensor:
        return torch.arange(count, device=self.device) % classes

    def contenders(self, ours: Contender, eager: Contender, **others: Contender) -> dict[str, Contender]:
        compiled = {"compiled": torch.compile(eager)} if self.compiled else {}
        return {"certtrain": ours, "eager": eager, **compiled, **others}


def ibp_relu(make: Maker, B: int, C: int, H: int) -> Case:
    center, radius = make.normal(B, C, H, H, grad=True), make.uniform(B, C, H, H, grad=True)
    return Case(
        "ibp_relu", f"B={B},C={C},H={H}",
        make.contenders(lambda: kernels.ibp_relu(center, radius), lambda: reference.ibp_relu(center, radius)),
        [center, radius], 4 * center.nbytes,
    )  # fmt: skip


def batch_statistics_norm(make: Maker, B: int, C: int, H: int) -> Case:
    x, w, b = make.normal(B, C, H, H, grad=True), make.normal(C, grad=True), make.normal(C, grad=True)
    return Case(
        "batch_statistics_norm", f"B={B},C={C},H={H}",
        make.contenders(
            lambda: kernels.batch_statistics_norm(x, w, b, 1e-5),
            lambda: reference.batch_statistics_norm(x, w, b, 1e-5),
            plain=lambda: F.batch_norm(x, None, None, w, b, training=True),
        ),
        [x, w, b], 2 * x.nbytes,
    )  # fmt: skip


def ibp_linear(make: Maker, B: int, D: int, H: int) -> Case:
    center, radius = make.normal(B, D, grad=True), make.uniform(B, D, grad=True)
    w, b = make.normal(H, D, grad=True), make.normal(H, grad=True)
    return Case(
        "ibp_linear", f"B={B},D={D},H={H}",
        make.contenders(
            lambda: kernels.ibp_linear(center, radius, w, b, relu=True),
            lambda: reference.ibp_linear(center, radius, w, b, relu=True),
            four_products=lambda: rivals.four_linear(center - radius, center + radius, w, b, relu=True),
            floor=lambda: (F.linear(center, w, b), F.linear(radius, w)),
        ),
        [center, radius, w, b],
    )  # fmt: skip


def ibp_conv2d(make: Maker, B: int, C: int, H: int, K: int, stride: int) -> Case:
    center, radius = make.normal(B, C, H, H, grad=True), make.uniform(B, C, H, H, grad=True)
    w, b = make.normal(K, C, 3, 3, grad=True), make.normal(K, grad=True)
    return Case(
        "ibp_conv2d", f"B={B},C={C},H={H},K={K},stride={stride}",
        make.contenders(
            lambda: kernels.ibp_conv2d(center, radius, w, b, stride, 1, relu=True),
            lambda: reference.ibp_conv2d(center, radius, w, b, stride, 1, relu=True),
            four_products=lambda: rivals.four_conv2d(center - radius, center + radius, w, b, stride, 1, relu=True),
            floor=lambda: (F.conv2d(center, w, b, stride, 1), F.conv2d(radius, w, None, stride, 1)),
        ),
        [center, radius, w, b],
    )  # fmt: skip


def ibp_margins(make: Maker, B: int, K: int, D: int) -> Case:
    center, radius = make.normal(B, D, grad=True), make.uniform(B, D, grad=True)
    w, b, labels = make.normal(K, D, grad=True), make.normal(K, grad=True), make.labels(B, K)
    return Case(
        "ibp_margins", f"B={B},K={K},D={D}",
        make.contenders(
            lambda: kernels.ibp_margins(center, radius, w, b, labels),
            lambda: reference.ibp_margins(center, radius, w, b, labels),
            bmm=lambda: rivals.bmm_margins(center, radius, w, b, labels),
        ),
        [center, radius, w, b],
    )  # fmt: skip


def crown_relu_step(make: Maker, B: int, R: int, N: int) -> Case:
    a, bias = make.normal(B, R, N, grad=True), make.normal(B, R, grad=True)
    lines = [make.uniform(B, N, grad=True) for _ in range(3)]
    return Case(
        "crown_relu_step", f"B={B},R={R},N={N}",
        make.contenders(
            lambda: kernels.crown_relu_step(a, bias, *lines), lambda: reference.crown_relu_step(a, bias, *lines),
            clamps=lambda: rivals.clamped_crown(a, bias, *lines),
        ),
        [a, bias, *lines], 2 * a.nbytes,
    )  # fmt: skip


def cut_box_minima(make: Maker, J: int, N: int, P: int, K: int) -> Case:
    forms, constants, cuts = make.normal(J, N), make.normal(J), make.normal(P, N)
    offsets = cuts.abs().sum(1) / 4
    rows = torch.arange(P * K, device=make.device).reshape(P, K) % J
    return Case(
        "cut_box_minima", f"J={J},N={N},P={P},K={K}",
        {  # a compiler unrolls the formula's loop over cuts
            "certtrain": lambda: kernels.cut_box_minima(forms, constants, cuts, offsets, rows),
            "eager": lambda: reference.cut_box_minima(forms, constants, cuts, offsets, rows),
            "breakpoints": lambda: rivals.sorted_breakpoints(forms, constants, cuts, offsets, rows),
        },
    )  # fmt: skip


def topk_mask(make: Maker, B: int, N: int, k: int) -> Case:
    scores = make.normal(B, N)
    return Case(
        "topk_mask", f"B={B},N={N},k={k}",
        make.contenders(
            lambda: kernels.topk_mask(scores, k), lambda: reference.topk_mask(scores, k),
            topk_scatter=lambda: rivals.topk_scatter(scores, k), released=lambda: rivals.sort_scatter(scores, k),
        ),
        touched=scores.nbytes + scores.numel(),
    )  # fmt: skip


def sparse_apply(make: Maker, B: int, N: int, k: int) -> Case:
    x, p, scores = make.uniform(B, 3, N), make.normal(B, 3, N), make.normal(B, N)
    return Case(
        "sparse_apply", f"B={B},N={N},k={k}",
        make.contenders(
            lambda: kernels.sparse_apply(x, p, scores, k), lambda: reference.sparse_apply(x, p, scores, k),
            topk_scatter=lambda: (x + p * rivals.topk_scatter(scores, k)[:, None]).clamp(0, 1),
        ),
        touched=3 * x.nbytes + scores.nbytes,
    )  # fmt: skip


def spgd_step(make: Maker, B: int, N: int, k: int) -> Case:
    gradient, x, m = make.normal(B, 3, N), make.uniform(B, 3, N), make.normal(B, N)
    p = torch.minimum(torch.maximum(make.uniform(B, 3, N) * 2 - 1, -x), 1 - x)
    mask = reference.topk_mask(m, k)
    settings = {"alpha": 0.25, "beta": 0.25, "projected": True}
    contenders = make.contenders(
        lambda: kernels.spgd_step(gradient, p, m, x, mask, k, **settings),
        lambda: reference.spgd_step(gradient, p, m, x, mask, k, **settings),
        closed_form=lambda: rivals.closed_step(gradient, p, m, x, mask, k, 0.25, 0.25),
        released=lambda: rivals.released_step(gradient, p, m, x, mask, k, 0.25, 0.25),
    )
    if make.compiled:  # the reference's stable sort, which breaks ties, does not compile to anything fast
        contenders["compiled"] = torch.compile(lambda: rivals.closed_step(gradient, p, m, x, mask, k, 0.25, 0.25))
    return Case("spgd_step", f"B={B},N={N},k={k}", contenders, touched=5 * x.nbytes + 2 * m.nbytes)


class Cnn7(nn.Sequential):
    """CNN7 at CIFAR size: five convolutions, two linear layers, batch norm with fixed statistics before each ReLU."""

    def __init__(self):
        widths = ((3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1))
        blocks = [nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in widths]
        last = nn.Sequential(nn.Linear(128 * 16 * 16, 512), nn.BatchNorm1d(512), nn.ReLU()), nn.Linear(512, 10)
        super().__init__(*blocks, nn.Flatten(), *last)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        self.eval()


def _propagate(ops, first: Tensor, second: Tensor, model: nn.Sequential, labels: Tensor) -> Tensor:
    """Margins by IBP through blocks, in the form of ``ops``: (center, radius) or (lower, upper)."""
    layers: list[Any] = list(model)
    *blocks, last = layers
    for block in blocks:
        if isinstance(block, nn.Flatten):
            first, second = first.flatten(1), second.flatten(1)
            continue
        layer, norm, _ = block
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        affine = {"scale": scale, "shift": norm.bias - norm.running_mean * scale, "relu": True}
        if isinstance(layer, nn.Conv2d):
            options = layer.weight, layer.bias, layer.stride[0], layer.padding[0]
            first, second = ops.ibp_conv2d(first, second, *options, **affine)
        else:
            first, second = ops.ibp_linear(first, second, layer.weight, layer.bias, **affine)
    return ops.ibp_margins(first, second, last.weight, last.bias, labels)


def cnn7(make: Maker, B: int) -> Case:
    model = Cnn7().to(make.device, make.dtype)
    images, labels, epsilon = make.uniform(B, 3, 32, 32), make.labels(B, 10), 2 / 255
    lower, upper = (images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1)
    center, radius = (upper + lower) / 2, (upper - lower) / 2
    contenders = make.contenders(
        lambda: _propagate(kernels, center, radius, model, labels),
        lambda: _propagate(reference, center, radius, model, labels),
        four_products=lambda: _propagate(rivals.FOUR, lower, upper, model, labels),
        plain=lambda: model(images),
    )
    if make.compiled:
        contenders["plain_compiled"] = torch.compile(lambda: model(images))
        contenders["certtrain_compiled"] = torch.compile(lambda: _propagate(kernels, center, radius, model, labels))
    case = Case("cnn7", f"B={B}", contenders, list(model.parameters()))
    try:
        contenders["auto_LiRPA"] = rivals.auto_lirpa(model, images, lower, upper, labels)
    except ImportError as error:
        case.notes.append(f"auto_LiRPA was not timed: {error}")
    return case


CASES: dict[str, tuple[Callable[..., Case], list[dict[str, int]]]] = {
    "cnn7": (cnn7, [{"B": 32}]),
    "ibp_conv2d": (ibp_conv2d, [{"B": 32, "C": 64, "H": 32, "K": 64, "stride": 1}]),
    "ibp_linear": (ibp_linear, [{"B": 32, "D": 32768, "H": 512}]),
    "ibp_relu": (ibp_relu, [{"B": 32, "C": 64, "H": 32}]),
    "batch_statistics_norm": (batch_statistics_norm, [{"B": 32, "C": 64, "H": 32}]),
    "ibp_margins": (ibp_margins, [{"B": 256, "K": 200, "D": 512}, {"B": 256, "K": 1000, "D": 512}]),
    "crown_relu_step": (crown_relu_step, [{"B": 32, "R": 9, "N": 16384}, {"B": 1, "R": 512, "N": 32768}]),
    "cut_box_minima": (cut_box_minima, [{"J": 512, "N": 3072, "P": 64, "K": 32}, {"J": 64, "N": 5, "P": 256, "K": 32}]),
    "topk_mask": (topk_mask, [{"B": 256, "N": 1024, "k": 20}, {"B": 32, "N": 50176, "k": 200}]),
    "sparse_apply": (sparse_apply, [{"B": 256, "N": 1024, "k": 20}]),
    "spgd_step": (spgd_step, [{"B": 256, "N": 1024, "k": 20}]),
}
ON_GPU = {"cnn7": [{"B": 256}], "ibp_conv2d": [{"B": 256, "C": 64, "H": 32, "K": 64, "stride": 1}]}
