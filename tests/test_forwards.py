"""Forwards that people write: traced, with bounds that hold, or refused with the other way named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import Apply
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import L2Ball, LinfBall, UnsupportedOperation, compute_bounds, trace
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.forward import forward
from certtrain.bounds.forward_linear import forward_bounds
from certtrain.bounds.rounding import FLOAT32
from certtrain.export import export_onnx
from certtrain.verifiers.onnx_network import read_onnx

IMAGE = (2, 4, 6)


def last(function: Callable[[nn.Module, Tensor], Tensor], **attributes) -> nn.Module:
    """A convolution, a ReLU, the function, and a ReLU of what it gives."""
    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(2, 4, 3, padding=1)}
    return Apply(lambda m, x: torch.relu(function(m, torch.relu(m.first(x)) - 0.1)).flatten(1), **layers, **attributes)


class WithFeatures(nn.Module):
    """A forward with options."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x, return_features=False, scale: float | None = None, *, bias=1.0, **_):
        assert x.dim() == 4 and x.ndim == 4 and len(x.shape) == 4
        batch, channels, _, _ = x.shape
        assert channels == 2
        features = torch.relu(self.body(x)).mean((2, 3))
        if return_features:
            return features
        logits = self.head(features.view(batch, -1))
        return logits + bias if scale is None else scale * logits


class Shortcut(nn.Module):
    """Without parameters, as in the first residual networks."""

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1), "constant", 0)


def residual() -> nn.Module:
    layers = {"block": nn.Conv2d(2, 4, 3, 2, 1), "shortcut": Shortcut()}
    return Apply(lambda m, x: (torch.relu(m.block(x)) + m.shortcut(x)).flatten(1), **layers)


def split_heads(m, x):
    batch, channels, height, width = x.shape
    x = x.reshape(batch, 2, channels // 2, height * width).permute(0, 3, 1, 2)
    return x.flatten(2).transpose(1, 2)


def gated_halves(m, x):
    first, second = x.chunk(2, dim=1)
    third, *_ = x.split([1, 3], 1)
    return torch.cat([first - second, third, x.unbind(1)[2].unsqueeze(1)], 1)


def own_weights() -> dict[str, Tensor]:
    return {"weight": nn.Parameter(torch.randn(5, 6)), "bias": torch.randn(5)}


FORWARDS: dict[str, Callable[[], nn.Module]] = {
    "mean of places": lambda: last(lambda m, x: x.mean((2, 3))),
    "mean by name": lambda: last(lambda m, x: torch.mean(x, dim=[-1, -2], keepdim=True)),
    "mean of means": lambda: last(lambda m, x: x.mean(-1).mean(-1)),
    "sum": lambda: last(lambda m, x: x.sum(1)),
    "sum of channels": lambda: last(lambda m, x: torch.sum(x, (1, 3), True)),
    "squeeze": lambda: last(lambda m, x: x.mean(1, keepdim=True).squeeze(1)),
    "squeeze of two": lambda: last(lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze((-1, -2))),
    "squeeze twice": lambda: last(lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)),
    "unsqueeze": lambda: last(lambda m, x: x.unsqueeze(1).flatten(2)),
    "permute": lambda: last(lambda m, x: x.permute(0, 2, 3, 1)[..., 1:]),
    "permute by list": lambda: last(lambda m, x: torch.permute(x, (0, 3, 1, 2))),
    "transpose": lambda: last(lambda m, x: x.flatten(2).transpose(1, 2)),
    "swapaxes": lambda: last(lambda m, x: x.swapaxes(-1, 2)),
    "movedim": lambda: last(lambda m, x: x.movedim(1, -1)),
    "flip": lambda: last(lambda m, x: x.flip(2, 3) + x.flip([1])),
    "roll": lambda: last(lambda m, x: torch.roll(x, (1, 2), dims=(2, 3))),
    "pad": lambda: last(lambda m, x: F.pad(x, (1, 0, 2, 1))),
    "pad with a number": lambda: last(lambda m, x: F.pad(x, (1, -1, 2, 1), value=0.7)),
    "pad by reflection": lambda: last(lambda m, x: F.pad(x, (1, 1, 2, 1), "reflect")),
    "pad with the edge": lambda: last(lambda m, x: F.pad(x, (1, 1, 2, 1), mode="replicate")),
    "pad around": lambda: last(lambda m, x: F.pad(x, (2, 1, 0, 1), mode="circular")),
    "pads": lambda: last(lambda m, x: m.d(m.c(m.b(m.a(x)))), a=nn.ZeroPad2d(1), b=nn.ConstantPad2d((0, 1, 1, 0), -0.3),
                         c=nn.ReflectionPad2d(2), d=nn.ReplicationPad2d((1, 0, 2, 0))),
    "chunk and split": lambda: last(gated_halves),
    "one channel": lambda: last(lambda m, x: x[:, 0]),
    "last of three": lambda: last(lambda m, x: x[:, 1:, -1, ::2]),
    "new dimension": lambda: last(lambda m, x: x[:, None, :, 0]),
    "narrow and select": lambda: last(lambda m, x: x.narrow(1, 1, 2).select(-1, 3)),
    "expand": lambda: last(lambda m, x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1)),
    "expand to a shape": lambda: last(lambda m, x: x.mean((1, 2, 3), keepdim=True).expand(x.shape) + x),
    "repeat": lambda: last(lambda m, x: x.repeat(1, 2, 1, 3)),
    "repeat_interleave": lambda: last(lambda m, x: x.repeat_interleave(2, dim=2)),
    "unflatten": lambda: last(lambda m, x: m.u(x.flatten(1)).unflatten(1, (2, -1)), u=nn.Unflatten(1, (4, 24))),
    "flatten from the end": lambda: last(lambda m, x: m.f(x).flatten(-2), f=nn.Flatten(-2, -1)),
    "F.linear": lambda: last(lambda m, x: F.linear(x, m.weight, m.bias), **own_weights()),
    "F.linear without bias": lambda: last(lambda m, x: F.linear(input=x, weight=m.weight), **own_weights()),
    "F.conv_transpose2d": lambda: last(
        lambda m, x: F.conv_transpose2d(x, m.weight, m.bias, (2, 1), padding=1, output_padding=(1, 0), groups=2),
        weight=nn.Parameter(torch.randn(4, 3, 3, 2)), bias=torch.randn(6)),
    "F.conv_transpose1d": lambda: last(lambda m, x: F.conv_transpose1d(x.flatten(2), m.weight, stride=2),
                                       weight=nn.Parameter(torch.randn(4, 2, 3))),
    "F.batch_norm": lambda: last(
        lambda m, x: F.batch_norm(x, m.mean, m.variance, m.weight, training=False, eps=0.1), mean=torch.rand(4),
        variance=torch.rand(4) + 0.5, weight=nn.Parameter(torch.randn(4))),
    "index_select": lambda: last(lambda m, x: x.index_select(-1, m.i) + torch.index_select(x, dim=3, index=m.i),
                                 i=torch.tensor([5, 0, 0, 2])),
    "a buffer of places": lambda: last(lambda m, x: x[:, m.i, 1:].mT[..., m.i, :], i=torch.tensor([2, 0, 0])),
    "unfold": lambda: last(lambda m, x: F.unfold(x, 3, padding=1, stride=2)),
    "unfold along a dimension": lambda: last(lambda m, x: x.unfold(2, 2, 1)),
    "constant matrix": lambda: last(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(6, 3))),
    "minus": lambda: last(lambda m, x: -x - torch.neg(x)),
    "sizes": lambda: last(split_heads),
    "sizes of a slice": lambda: last(lambda m, x: x.view(*x.shape[:2], -1)[:, :, : x.size(-1) // 2]),
    "size of another": lambda: last(lambda m, x: x.view(x.size(0), x.size(1), x.size(2) * x.size(3)).view(x.size())),
    "pool of the image's size": lambda: last(lambda m, x: F.avg_pool2d(x, (x.size()[2], x.size(3)))),
    "options": WithFeatures,
    "comparison of sizes": lambda: last(lambda m, x: x if x.shape != x[:, 1:].shape and x.shape == (-x).shape else -x),
    "shapes of others": lambda: last(lambda m, x: x.flatten(1).view_as(x) + x.mean(axis=1, keepdim=True).expand_as(x)),
    "stacked channels": lambda: last(lambda m, x: torch.stack([c.mT for c in x.unbind(1)][::-1], -2) - m.b.mean(),
                                     b=torch.rand(2, 3)),
    "shortcut": residual,
    "interpolate": lambda: last(lambda m, x: F.interpolate(x, scale_factor=2)),
    "interpolate to sizes": lambda: last(lambda m, x: F.interpolate(x, size=(7, 4), mode="nearest")),
    "interpolate exactly": lambda: last(lambda m, x: F.interpolate(x, (5, 8), mode="nearest-exact")),
    "interpolate between": lambda: last(lambda m, x: F.interpolate(x, (7, 5), mode="bilinear", align_corners=True)),
    "interpolate area": lambda: last(lambda m, x: F.interpolate(x, size=x.shape[3] // 2, mode="area")),
    "interpolate lines": lambda: last(lambda m, x: F.interpolate(x.flatten(2), scale_factor=1.5, mode="linear")),
    "upsample": lambda: last(lambda m, x: m.u(x), u=nn.Upsample(scale_factor=2, mode="bilinear")),
    "upsample nearest": lambda: last(lambda m, x: m.u(x), u=nn.UpsamplingNearest2d(size=(8, 9))),
    "pixel shuffle": lambda: last(lambda m, x: m.u(F.pixel_unshuffle(m.s(x), 2)), s=nn.PixelShuffle(2),
                                  u=nn.PixelShuffle(2)),
    "transposed convolution": lambda: last(lambda m, x: m.t(x), t=nn.ConvTranspose2d(4, 3, 3, 2, 1, 1)),
    "transposed convolution of groups": lambda: last(
        lambda m, x: m.t(x), t=nn.ConvTranspose2d(4, 6, (2, 3), (3, 2), (0, 1), (2, 0), 2, False, (1, 2))),
    "transposed convolution of a sequence": lambda: last(
        lambda m, x: m.t(x.flatten(2)), t=nn.ConvTranspose1d(4, 2, 3, 2, 1)),
    "dropout": lambda: last(lambda m, x: F.dropout(x, 0.3, training=m.training)),
    "no dropout": lambda: last(lambda m, x: F.dropout(x, training=False)),
}  # fmt: skip


@walk("name", FORWARDS)
def test_bounds_hold(name):
    """Bounds of every kind enclose the model's values; its network is the model."""
    model = FORWARDS[name]().double().eval()
    images = torch.rand(3, *IMAGE, dtype=torch.float64)
    for count in (3, 1, 0 if name != "pixel shuffle" else 2):  # torch 2.15 unshuffles an empty batch to another shape
        found = trace(model, images.shape[1:])(images[:count])
        if count:
            torch.testing.assert_close(found, model(images[:count].clone()), rtol=1e-12, atol=1e-12)
    region, network = LinfBall(0.1).region(images), fold(model, images.shape[1:])
    box = compute_bounds(model, region)
    forms = torch.randn(3, 4, box.center.shape[1], dtype=torch.float64)
    every = [interval_bounds(network, region), crown_bounds(network, region), forward_bounds(network, region)]
    least = [bound_forms(network, region, forms, bounds) for bounds in every[:2]]
    hull = region.hull
    for number in range(20):
        shares = 2 * torch.rand_like(images) - 1
        values = network.values(hull.center + hull.radius * (shares.sign() if number % 2 else shares))
        assert box.contains(values[-1], 1e-9).all()
        for bounds in every:
            for place, one in bounds.items():
                (source,) = network.operations[place].inputs
                assert ((one.lower - 1e-9 <= values[source]) & (values[source] <= one.upper + 1e-9)).all()
        for rows in least:
            assert (rows <= torch.einsum("brk,bk->br", forms, values[-1]) + 1e-9).all()


@walk("name", FORWARDS)
def test_rounded_networks_are_enclosed(name):
    """With the rounding of float32, bounds of a point enclose the float32 model's own numbers, and are narrow."""
    model = FORWARDS[name]().eval()
    images = torch.rand(4, *IMAGE)
    network = replace(fold(model, images.shape[1:], dtype=torch.float64), rounding=FLOAT32)
    found = interval_bounds(network, LinfBall(0.0).region(images.double()))
    values = fold(model, images.shape[1:]).values(images)
    for place, bounds in found.items():
        (source,) = network.operations[place].inputs
        own = values[source].double()
        assert ((bounds.lower <= own) & (own <= bounds.upper)).all() and (bounds.upper - bounds.lower).max() < 1e-3


@walk("name", FORWARDS)
def test_gradients_reach_every_weight(name):
    model = FORWARDS[name]().train()
    bounds = compute_bounds(model, LinfBall(0.05).region(torch.rand(3, *IMAGE)))
    bounds.upper.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


EXPORTED = {"F.linear", "interpolate between", "pad with a number", "sizes", "stacked channels",
            "transposed convolution"}  # fmt: skip


@pytest.mark.parametrize("names", [EXPORTED, pytest.param(FORWARDS.keys() - EXPORTED, marks=pytest.mark.slow)])
def test_what_is_exported_is_read_back(names, tmp_path: Path):
    images = torch.rand(3, *IMAGE)
    for name in sorted(names):
        model = FORWARDS[name]().eval()
        assert export_onnx(model, tmp_path / "model.onnx", images).folded
        network = read_onnx(tmp_path / "model.onnx")
        torch.testing.assert_close(network.module(images), model(images).flatten(1), rtol=0, atol=1e-5)


def test_a_functional_dropout_follows_the_mode():
    model = FORWARDS["dropout"]().train()
    trace(model)
    torch.manual_seed(1)
    images = torch.rand(3, *IMAGE)
    assert not torch.equal(forward(model, images).logits, forward(model, images).logits)
    model.eval()
    torch.testing.assert_close(forward(model, images).logits, model(images))


def test_a_network_of_sizes_is_one_for_its_shape():
    model = FORWARDS["sizes"]()
    with pytest.raises(UnsupportedOperation, match=r"reads sizes; accepted: trace\(model, shape"):
        trace(model)
    small, large = (torch.rand(2, 2, size, size) for size in (4, 6))
    first = trace(model, small.shape[1:])
    assert trace(model, small.shape[1:]) is first is trace(model)
    for images in (small, large, small):
        torch.testing.assert_close(forward(model, images).logits, model(images))
        compute_bounds(model.eval(), LinfBall(0.1).region(images))


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[str]]] = {
    "mean of all": (lambda m, x: x.mean(), ["mean", "all dimensions", "behind the batch's"]),
    "mean of the batch": (lambda m, x: x.mean(0), ["mean", r"dimensions \[0\] of 4"]),
    "mean of the batch, from the end": (lambda m, x: x.sum((-4, 1)), ["sum", r"\[-4, 1\] of 4"]),
    "squeeze": (lambda m, x: x.squeeze(), ["squeeze", "a batch of one would vanish"]),
    "permuted batch": (lambda m, x: x.permute(2, 1, 0, 3), ["permute", "the batch's, 0, first"]),
    "transposed batch": (lambda m, x: x.transpose(0, 2), ["transpose", r"\[0, 2\] of 4"]),
    "batch as dimension 1": (lambda m, x: x.permute(1, 0, 2, 3), ["flatten", "is dimension 1 since 'permute'"]),
    "batch and channels swapped": (lambda m, x: x.transpose(0, 1), ["flatten", "is dimension 1 since 'transpose'"]),
    "split batch": (lambda m, x: x.chunk(2)[0], ["chunk", r"\[0\] of 4"]),
    "one image": (lambda m, x: x[0], ["x.0.", "the batch whole"]),
    "expanded batch": (lambda m, x: x.mean(1).expand(2, 3, 4, 6), ["expand", "of 3 dimensions"]),
    "padded batch": (lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)), ["pad", "around 4 dimensions"]),
    "flattened batch": (lambda m, x: x.flatten(-4), ["start_dim=-4", "keeps the batch"]),
    "a batch of places": (lambda m, x: x.view(x.shape[0] * 4, -1), ["view"]),
    "random dropout": (lambda m, x: F.dropout(x), ["draws in evaluation mode"]),
    "bicubic": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bicubic"), ["bicubic", "nearest"]),
    "a branch on values": (lambda m, x: x if x.sum() > 0 else -x, ["cannot be traced|all dimensions", "export_onnx"]),
    "a batch norm of the mode": (
        lambda m, x: F.batch_norm(x, None, None, training=m.training),
        ["batch_norm", "nn.BatchNorm2d"],
    ),
    "a batch norm without statistics": (lambda m, x: F.batch_norm(x, None, None), ["no running statistics"]),
    "index of the batch": (lambda m, x: x[torch.tensor([0])], ["a tensor made inside forward"]),
    "norm of all": (lambda m, x: x / x.norm(), ["norm", "all dimensions"]),
    "sum of sizes": (lambda m, x: x.norm(1, dim=1), ["p=1", "a Euclidean norm"]),
    "spectral norm": (lambda m, x: torch.linalg.norm(x, 2, dim=(2, 3)), ["ord=2", "a Euclidean norm"]),
    "variance of the batch": (lambda m, x: x.var(0), ["var", r"dimensions \[0\]"]),
    "variance of one": (lambda m, x: x[:, :1].var(1), ["found 1 entries", "more than the correction, 1"]),
    "a layer norm of a number": (lambda m, x: F.layer_norm(x, 6), ["normalized_shape=6", "sizes of the last"]),
    "a computed weight": (lambda m, x: F.linear(x, x[:, 0, 0]), ["linear", "computed from the images"]),
    "comparison with a batch": (
        lambda m, x: x if x.shape == (2, 4, 4, 6) else -x,
        ["compared with a number|comparison of"],
    ),
    "stacked batches": (lambda m, x: torch.stack([x, x]), ["stack", "dim=0", "behind the batch's"]),
    "stacked batches, from the end": (lambda m, x: torch.stack([x, x], -5), [r"stack", r"\[-5\] of 5"]),
    "another precision": (lambda m, x: x.to(torch.float16), ["float16", "float32"]),
}


@walk("name", REFUSED)
def test_refusals_name_what_is_accepted(name):
    function, mentions = REFUSED[name]
    with pytest.raises(UnsupportedOperation) as raised:
        fold(last(function), torch.Size(IMAGE))
    assert "\n" not in str(raised.value)
    for mention in mentions:
        raised.match(mention)


FIRST = [lambda x: x[:, :1], lambda x: x[:, 0], lambda x: F.pad(x, (1, 1)), lambda x: F.pad(x, (1, 1), value=0.5),
         lambda x: x.permute(0, 2, 3, 1)]  # fmt: skip


@pytest.mark.parametrize("function", FIRST)
def test_first_layers_over_sets_that_are_no_boxes(function):
    """The layer that the images reach unchanged but for their places, over an l2 ball: enclosed, or refused."""
    x = torch.rand(3, *IMAGE)
    model = Apply(lambda m, x: m.linear(function(x).flatten(1)), linear=nn.Linear(function(x).flatten(1).shape[1], 3))
    region = L2Ball(0.2).region(x)
    try:
        found = compute_bounds(model.eval(), region)
    except UnsupportedOperation:
        return
    for _ in range(50):
        step = F.normalize(torch.randn(3, x[0].numel()), dim=1).reshape(x.shape) * 0.2
        assert found.contains(model((x + step).clamp(0, 1)), 1e-5).all()


CHANGED = {
    "transpose": lambda y: y.transpose(1, 2),
    "chunk": lambda y: y.chunk(2, 1)[0],
    "squeeze": lambda y: y.squeeze(1),
    "expanded": lambda y: y.unflatten(1, (2, 2)),
    "index": lambda y: y[:, 0],
    "no dropout": lambda y: F.dropout(y, training=False),
    "float": lambda y: y.double(),
}


@walk("name", CHANGED)
def test_views_that_are_changed_in_place_are_refused(name):
    model = last(lambda m, x: (CHANGED[name](x).relu_().sum(1, keepdim=True), x)[1]).double()
    x = torch.rand(2, *IMAGE, dtype=torch.float64)
    try:
        found = compute_bounds(model.eval(), LinfBall(0.0).region(x)).center
    except UnsupportedOperation as refusal:
        assert "accepted" in str(refusal) or "supported" in str(refusal)
    else:
        torch.testing.assert_close(found, model(x))
