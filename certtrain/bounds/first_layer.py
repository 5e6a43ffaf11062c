"""The first affine layer over a set that is not a box: each output is a linear form, bounded by ``concretise``.

After that layer the intervals go on as usual. For a convolution an output sees one patch of the image, and
the set's projection to a patch is a set of the same kind, or lies in one, so the forms are concretised patch by patch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import program as p
from .convolution import convolve
from .forward import RULES, _Run
from .interval import Interval
from .region import Region


def first_layer(node: p.Affine, position: int, run, hull: Interval) -> Interval:
    """Tight bounds of the layer's outputs over ``run.region``; ``hull`` is the box that enters it."""
    images = run.region.images
    scale, shift = _input_map(node, run, images)
    weight, bias = run.weights(node, position)
    layer = node.layer
    linear = isinstance(layer, nn.Linear)
    kept = scale.numel() == images[:1].numel() if linear else scale.shape[1:] == images.shape[1:]
    if not kept and len(images):
        raise p.UnsupportedNode(
            f"{type(layer).__name__} at {node.path!r} as the first layer over {run.region.kind}: "
            f"found an input of shape {tuple(scale.shape[1:])}; accepted: the image's own, {tuple(images.shape[1:])}"
        )
    if not linear:
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise p.UnsupportedNode(
                f"{type(layer).__name__} at {node.path!r} as the first layer over {run.region.kind}: "
                "accepted: groups=1 and zero padding given in numbers"
            )
        if not run.region.has_windows:
            raise p.UnsupportedNode(
                f"{type(layer).__name__} at {node.path!r} as the first layer over {run.region.kind} of patches: "
                "accepted: a Linear, or pixels, features, rows and columns"
            )
        constant = convolve(shift, weight, bias, layer.stride, layer.padding, layer.dilation, 1)
        if isinstance(layer, nn.Conv1d):  # a row of an image
            weight, scale, constant = (x.unsqueeze(2) for x in (weight, scale, constant))
            return _windows(run.region, layer, weight, scale, constant).map(lambda x: x.squeeze(2))
        return _windows(run.region, layer, weight, scale, constant)
    if hull.center.ndim != 2:
        raise p.UnsupportedNode(
            f"Linear at {node.path!r}: found {hull.center.ndim} dimensions; accepted: (B, features)"
        )
    forms = (weight * scale).reshape(1, len(weight), *images.shape[1:])
    return _bounds(run.region, forms.expand(len(images), *forms.shape[1:]), F.linear(shift, weight, bias))


def _input_map(node: p.Affine, run, images: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) of the elementwise map before the layer, each (1, *its input's shape)."""

    def evaluate(position: int, value: Tensor) -> Tensor:
        step = run.program.nodes[position]
        if isinstance(step, p.Input):
            return value
        return RULES[type(step)](step, position, _Run(None), *(evaluate(read, value) for read in step.inputs))

    shift = evaluate(node.inputs[0], torch.zeros_like(images[:1]))
    return evaluate(node.inputs[0], torch.ones_like(images[:1])) - shift, shift


def _unfold(layer: p.Convolution, images: Tensor) -> Tensor:
    """(N, C·h·w, L) of (N, C, H, W): the L windows that the layer sees of each image."""

    def pair(sizes: tuple[int, ...], missing: int) -> tuple[int, ...]:
        return (missing, *sizes)[-2:]

    assert not isinstance(layer.padding, str)
    walk = pair(layer.dilation, 1), pair(layer.padding, 0), pair(layer.stride, 1)
    return F.unfold(images, pair(layer.kernel_size, 1), *walk)


def _windows(region: Region, layer: p.Convolution, weight: Tensor, scale: Tensor, constant: Tensor) -> Interval:
    """By forms (B·L, K, C, h, w) over the windows (B·L, C, h, w) that they act on; padding has coefficient 0."""
    count, images = len(region), region.images
    shape = (images.shape[1], *weight.shape[2:])

    def cut(x: Tensor) -> Tensor:
        x = x if x.ndim == 4 else x.unsqueeze(2)
        return _unfold(layer, x).transpose(1, 2).reshape(-1, *shape)

    forms = _unfold(layer, scale).transpose(1, 2).unsqueeze(2) * weight.flatten(1)  # (1, L, K, C·h·w)
    forms = forms.expand(count, -1, -1, -1).reshape(-1, len(weight), *shape)
    each = torch.arange(count, device=images.device).repeat_interleave(constant.shape[2:].numel())
    return _bounds(region.windows(each, cut), forms, constant)


def _bounds(region: Region, forms: Tensor, constant: Tensor) -> Interval:
    lower, upper = region.concretise(forms), -region.concretise(-forms)
    if constant.ndim == 4:  # (B·L, K) → (B, K, H', W')
        height, width = constant.shape[2:]
        lower, upper = (
            end.reshape(-1, height, width, end.shape[1]).permute(0, 3, 1, 2) for end in (lower, upper)
        )  # fmt: skip
    return Interval.from_bounds(lower + constant, torch.maximum(lower, upper) + constant)
