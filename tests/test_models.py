"""Architectures as published: sizes, order of layers, first layer, initial weights."""

import math

import pytest
import torch
from torch import nn

from certtrain.errors import InputError
from certtrain.models import Architecture, Cnn7, Mlp, Normalise, SmallCnn, initialise_for_ibp

MODELS = [cls for cls in Architecture.members().values() if cls.__module__.startswith("certtrain.")]
every_model = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def names(model: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in model.children()]


@pytest.mark.parametrize(("shape", "parameters"), [((1, 28, 28), 13_259_338), ((3, 32, 32), 17_192_650)])
def test_cnn7_is_the_published_net(shape, parameters):
    model = Cnn7().build(shape, 10)
    assert size(model) == parameters
    block = ["BatchNorm2d", "ReLU"]
    assert names(model) == [*(["Conv2d", *block] * 5), "Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 64, 128, 128, 128]
    assert [layer.stride for layer in convolutions] == [(1, 1), (1, 1), (2, 2), (1, 1), (1, 1)]
    assert all(layer.kernel_size == (3, 3) and layer.padding == (1, 1) for layer in convolutions)
    assert all(layer.bias is not None for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear)))
    assert model.eval()(torch.rand(1, *shape)).shape == (1, 10)


def test_cnn7_widths_of_the_reference_sheet():
    assert size(Cnn7(width=32).build((3, 32, 32), 10)) == 8_498_282
    assert size(Cnn7(width=128).build((3, 32, 32), 10)) == 35_189_642


def test_small_cnn_and_mlp_sizes():
    """Counted by hand: weights + biases, then two numbers per normalised feature."""
    small = (16 * 16 + 16) + (16 * 16 * 32 + 32) + (32 * 4 * 100 + 100) + (100 * 10 + 10)
    assert size(SmallCnn(batch_norm=False).build((1, 8, 8), 10)) == small
    assert size(SmallCnn().build((1, 8, 8), 10)) == small + 2 * (16 + 32 + 100)
    mlp = (64 * 5 + 5) + (5 * 4 + 4) + (4 * 3 + 3)
    assert size(Mlp(hidden=(5, 4)).build((1, 8, 8), 3)) == mlp
    assert size(Mlp(hidden=(5, 4), batch_norm=True).build((1, 8, 8), 3)) == mlp + 2 * (5 + 4)
    assert names(Mlp(hidden=()).build((1, 8, 8), 3)) == ["Flatten", "Linear"]


@pytest.mark.parametrize("side", range(4, 13))
def test_small_cnn_takes_any_side(side):
    assert SmallCnn(width=2, hidden=3).build((1, side, side + 1), 5).eval()(torch.rand(2, 1, side, side + 1)).shape == (
        2,
        5,
    )


@every_model
def test_every_model_maps_a_batch_to_logits_and_normalises_first(kind):
    fields = {name: 4 for name in ("width",) if hasattr(kind, name)}
    plain = kind(**fields).build((3, 32, 32), 7)
    model = kind(**fields, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)).build((3, 32, 32), 7)
    assert plain.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert names(model) == ["Normalise", *names(plain)]
    assert size(model) == size(plain)  # mean and std are no parameters …
    assert {"0.mean", "0.std"} <= set(model.state_dict())  # … but travel with the weights


def test_normalise():
    images = torch.rand(2, 3, 4, 5)
    found = Normalise((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))(images)
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 1.0), (0.3, 2.0))):
        torch.testing.assert_close(found[:, channel], (images[:, channel] - mean) / std)


@pytest.mark.parametrize(
    ("architecture", "shape", "named"),
    [
        (Cnn7(), (3, 64, 64), "64×64.*accepted: 28×28 or 32×32"),
        (Cnn7(), (1, 28, 32), "28×32"),
        (Cnn7(), (1, 8, 8), "8×8"),
        (SmallCnn(), (1, 3, 8), "3×8.*accepted: 4×4"),
        (Mlp(mean=(0.1, 0.2), std=(1.0, 1.0)), (3, 8, 8), "mean: found 2 numbers; accepted: 3"),
    ],
)
def test_images_that_do_not_fit_are_refused(architecture, shape, named):
    with pytest.raises(InputError, match=named):
        architecture.build(shape, 10)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Mlp(hidden=(5, 0)), "hidden"),
        (lambda: Cnn7(width=0), "width"),
        (lambda: SmallCnn(hidden=-1), "hidden"),
        (lambda: Mlp(mean=(0.1,)), "mean"),
        (lambda: Mlp(mean=(0.1,), std=(0.0,)), "std"),
        (lambda: Mlp(mean=(0.1,), std=(float("nan"),)), "std"),
    ],
)
def test_bad_fields_are_refused(build, field):
    with pytest.raises(InputError, match=f"^{field}: found .*accepted"):
        build()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_shi_initialisation(shape):
    """sigma = sqrt(2 pi) / fan_in for all but the last layer; everything else keeps torch's default."""
    torch.manual_seed(0)
    usual = Cnn7(width=16, hidden=64).build(shape, 10)
    torch.manual_seed(0)
    model = Cnn7(width=16, hidden=64).build(shape, 10)
    initialise_for_ibp(model)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    before = [layer for layer in usual.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, old in zip(layers[:-1], before[:-1], strict=True):
        weight = layer.weight.detach().flatten()
        count = weight.numel()
        sigma = math.sqrt(2 * math.pi) / layer.weight[0].numel()
        assert float(weight.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * count))
        assert float(weight.mean()) == pytest.approx(0, abs=5 * sigma / math.sqrt(count))
        assert float((weight / sigma).pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / count))  # a normal
        assert torch.equal(layer.bias, old.bias)
    assert torch.equal(layers[-1].weight, before[-1].weight) and torch.equal(layers[-1].bias, before[-1].bias)


def test_shi_initialisation_keeps_the_width_of_boxes():
    """What it is for: E|w| · fan_in / 2 = 1."""
    torch.manual_seed(0)
    model = Mlp(hidden=(1000, 1000)).build((1, 30, 30), 10)
    initialise_for_ibp(model)
    for layer in [layer for layer in model.modules() if isinstance(layer, nn.Linear)][:-1]:
        gain = layer.weight.detach().abs().sum(1).mean() / 2
        assert float(gain) == pytest.approx(1, rel=0.01)
