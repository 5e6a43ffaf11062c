"""Each kernel with its options and arguments: what the files about kernels walk over."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from certtrain import kernels


@dataclass(frozen=True)
class Call:
    """``run(*leaves)`` calls the op. Its gradients are derivatives of its values, unless it has none or says so."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: Sequence[Tensor]
    gradients: bool = True
    exact: bool = field(default=True, kw_only=True)  # a straight-through gradient is not the value's
    formula: bool = field(default=True, kw_only=True)  # a small call on the CPU is left to plain torch


def tensors(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def table(dtype: torch.dtype = torch.float64, last: bool = False) -> dict[str, Call]:
    """Small random arguments, the same in each call and away from kinks; images channels_last where asked."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if last and values.ndim == 4 else values

    def positive(*shape: int) -> Tensor:
        return normal(*shape).abs() / 4

    flat, image = (normal(3, 4), positive(3, 4)), (normal(2, 4, 5, 4), positive(2, 4, 5, 4))
    weight, kernel = normal(5, 4), normal(6, 2, 3, 2)
    bias, scale, shift = normal(5), normal(5), normal(5)
    onto = {"bias": normal(6), "scale": normal(6), "shift": normal(6)}
    channel, labels = (normal(4), normal(4)), torch.tensor([2, 0, 4])
    forms, lines = (normal(2, 3, 4, 2), normal(2, 3)), (positive(2, 4, 2), positive(2, 4, 2), positive(2, 4, 2))
    own = lines[0], positive(2, 3, 4, 2), positive(2, 3, 4, 2)
    x, p, scores = positive(2, 3, 4, 5).clamp(max=1), normal(2, 3, 4, 5), normal(2, 4, 5)
    p = torch.minimum(torch.maximum(p.clamp(-1, 1), -x), 1 - x)
    rows = torch.tensor([[2, -1, 0, 1], [1, 1, 3, 2], [-1, 3, 0, 0]])
    mask, budgets = (torch.arange(40).reshape(2, 4, 5) % 7 == 0).to(torch.uint8), torch.tensor([3, 25])

    k, grouped = kernels, {"stride": (2, 1), "padding": (0, 1), "groups": 2}
    return {
        "linear": Call(k.ibp_linear, (*flat, weight, bias)),
        "linear bare": Call(k.ibp_linear, (*flat, weight)),
        "linear shift": Call(lambda c, r, w, t: k.ibp_linear(c, r, w, shift=t), (*flat, weight, shift)),
        "linear relu": Call(lambda c, r, w, b: k.ibp_linear(c, r, w, b, relu=True), (*flat, weight, bias)),
        "linear affine": Call(
            lambda c, r, w, b, a, t: k.ibp_linear(c, r, w, b, scale=a, shift=t), (*flat, weight, bias, scale, shift)
        ),
        "linear affine relu": Call(
            lambda c, r, w, a: k.ibp_linear(c, r, w, scale=a, relu=True),
            (flat[0].expand(2, 3, 4), flat[1].expand(2, 3, 4), weight, scale),
        ),
        "conv": Call(lambda c, r, w: k.ibp_conv2d(c, r, w, **grouped), (*image, kernel)),
        "conv same": Call(
            lambda c, r, w, b: k.ibp_conv2d(c, r, w, b, padding="same", groups=2), (*image, kernel, onto["bias"])
        ),
        "conv affine relu": Call(
            lambda c, r, w, b, a, t: k.ibp_conv2d(c, r, w, b, **grouped, scale=a, shift=t, relu=True),
            (*image, kernel, *onto.values()),
        ),
        "affine": Call(k.ibp_affine, (*image, *channel)),
        "affine relu": Call(lambda c, r, a, t: k.ibp_affine(c, r, a, t, relu=True), (*image, *channel)),
        "affine of rows": Call(lambda c, r, a, t: k.ibp_affine(c, r, a, t, relu=True), (*flat, *channel)),
        "relu": Call(k.ibp_relu, image),
        "norm": Call(lambda x, w, b: k.batch_statistics_norm(x, w, b, 1e-3), (image[0], *channel)),
        "norm bare": Call(lambda x: k.batch_statistics_norm(x, None, None, 1e-3), (flat[0],)),
        "margins": Call(
            lambda c, r, w, b: k.ibp_margins(c, r, w, b, labels), (*flat, weight, bias), formula=False
        ),
        "margins bare": Call(lambda c, r, w: k.ibp_margins(c, r, w, None, labels), (*flat, weight), formula=False),
        "crown lower": Call(k.crown_relu_step, (*forms, *lines)),
        "crown upper": Call(lambda *given: k.crown_relu_step(*given, upper=True), (*forms, *own)),
        "cut": Call(
            lambda *given: k.cut_box_minima(*given, rows), (normal(4, 9), normal(4), normal(3, 9), normal(3)), False,
            formula=False,
        ),
        "topk": Call(lambda s: k.topk_mask(s, 6), (scores,), False, formula=False),
        "topk rows": Call(lambda s: k.topk_mask(s, budgets), (scores,), False, formula=False),
        "apply": Call(lambda *given: k.sparse_apply(*given, 6), (x, p, scores), exact=False, formula=False),
        "apply unprojected": Call(
            lambda *given: k.sparse_apply(*given, budgets, projected=False), (x, p, scores), exact=False, formula=False
        ),
        "step": Call(
            lambda g, p, m, x: k.spgd_step(g, p, m, x, mask, 6, alpha=0.25, beta=0.5, projected=True),
            (normal(2, 3, 4, 5), p, scores, x), False, formula=False,
        ),
        "step unprojected": Call(
            lambda g, p, m, x: k.spgd_step(g, p, m, x, mask, budgets, alpha=1.0, beta=1.0, projected=False),
            (normal(2, 3, 4, 5), p, scores, x), False, formula=False,
        ),
    }  # fmt: skip


NAMES = list(table())
DIFFERENTIABLE = [name for name, call in table().items() if call.gradients]


def outcome(call: Call, run: Callable | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradient in every leaf of a fixed function of them."""
    leaves = [leaf.detach().clone(memory_format=torch.preserve_format) for leaf in call.leaves]
    if call.gradients:
        leaves = [leaf.requires_grad_() for leaf in leaves]
    found = tensors((run or call.run)(*leaves))
    if not call.gradients:
        return list(found), []
    floats = [part for part in found if part.dtype.is_floating_point]
    onto = [torch.linspace(-1, 2, part.numel(), dtype=part.dtype).reshape(part.shape) for part in floats]
    return [part.detach() for part in found], list(torch.autograd.grad(floats, leaves, onto))
