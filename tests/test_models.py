"""Architectures as published: sizes, order of layers, first layer, initial weights."""

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from walking import walk

from certtrain.bounds import Interval, UnsupportedOperation, compute_bounds
from certtrain.config import structure, unstructure
from certtrain.errors import InputError
from certtrain.models import (
    Architecture,
    Cnn3,
    Cnn5,
    Cnn7,
    Gowal,
    Mlp,
    Normalise,
    PreActResNet,
    ResNet,
    SmallCnn,
    initialise_for_ibp,
)
from certtrain.models.initialisation import fed_by_sums

MODELS = [cls for cls in Architecture.members().values() if cls.__module__.startswith("certtrain.")]
every_model = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
MNIST, CIFAR, TINY = (1, 28, 28), (3, 32, 32), (3, 64, 64)


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


PUBLISHED = [
    (Cnn7(), TINY, 200, 17_290_120),
    (Cnn7(), TINY, 1000, 17_700_520),
    (Cnn7(last_stride=1), TINY, 200, 67_621_768),
    (Cnn7(width=32), CIFAR, 10, 8_498_282),
    (Cnn7(width=128), CIFAR, 10, 35_189_642),
    (Cnn7(batch_norm=False), MNIST, 10, 13_257_290),
    (Cnn7(batch_norm=False), CIFAR, 10, 17_190_602),
    (Cnn7(more=2), CIFAR, 10, 17_488_330),
    (Cnn7(more=4), CIFAR, 10, 17_784_010),
    (Cnn5(batch_norm=False), MNIST, 10, 820_954),
    (Cnn5(batch_norm=False), CIFAR, 10, 1_067_002),
    (Cnn5(), MNIST, 10, 822_106),
    (Cnn5(), CIFAR, 10, 1_068_154),
    (Cnn5(width=64), MNIST, 10, 3_415_882),
    (Cnn5(width=64), CIFAR, 10, 4_400_074),
    (Cnn5(width=32, growth=4, hidden=250, batch_norm=False), MNIST, 10, 1_653_160),  # ConvMedBig
    (Cnn5(width=32, growth=4, hidden=250, batch_norm=False), CIFAR, 10, 2_133_736),
    (Cnn3(batch_norm=False), MNIST, 10, 24_330),
    (Cnn3(batch_norm=False), CIFAR, 10, 29_930),
    (Cnn3(), MNIST, 10, 24_426),
    (Cnn3(), CIFAR, 10, 30_026),
    (Cnn3(width=64), MNIST, 10, 195_978),
    (Cnn3(width=64), CIFAR, 10, 218_378),
    (Cnn3(hidden=512, batch_norm=False), MNIST, 10, 817_098),  # cnn_4layer
    (Cnn3(hidden=512, batch_norm=False), CIFAR, 10, 1_063_658),
    (Cnn3(width=32, growth=4, hidden=250, batch_norm=False), MNIST, 10, 1_637_256),  # ConvMed
    (Cnn3(width=32, growth=4, hidden=250, batch_norm=False), CIFAR, 10, 2_118_856),
    (Gowal(size="small"), MNIST, 10, 329_606),
    (Gowal(size="small"), CIFAR, 10, 470_918),
    (Gowal(size="medium"), MNIST, 10, 893_418),
    (Gowal(size="medium"), CIFAR, 10, 1_188_906),
    (Gowal(size="large"), MNIST, 10, 3_623_498),
    (Gowal(size="large"), CIFAR, 10, 5_721_802),
]


@walk(("architecture", "shape", "classes", "parameters"), PUBLISHED)
def test_sizes_of_the_reference_sheet(architecture, shape, classes, parameters):
    with torch.device("meta"):
        assert size(architecture.build(shape, classes)) == parameters


MACS = [  # in millions, at the precision of the reference sheet
    (Cnn7(), MNIST, 114, 0.5),
    (Cnn7(), CIFAR, 151, 0.5),
    (Cnn7(), TINY, 439, 0.5),
    (Cnn5(), MNIST, 2.1, 0.05),
    (Cnn5(), CIFAR, 3.1, 0.05),
    (Cnn3(), MNIST, 0.5, 0.05),
    (Cnn3(), CIFAR, (3 * 25 * 16 * 16**2 + 16 * 16 * 32 * 8**2 + 2048 * 10) / 1e6, 0),  # the sheet truncates it to 0.8
    (Gowal(size="small"), MNIST, 1.2, 0.05),
    (Gowal(size="medium"), CIFAR, 9.4, 0.05),
    (Gowal(size="large"), MNIST, 53, 0.5),
    (Gowal(size="large"), CIFAR, 78, 0.5),
]


@pytest.mark.parametrize(("architecture", "shape", "millions", "precision"), MACS)
def test_work_of_the_reference_sheet(architecture, shape, millions, precision):
    """Strides and paddings that the number of parameters does not show: multiplications of one forward pass."""
    found = 0

    def count(layer, _, output):
        nonlocal found
        found += layer.weight[0].numel() * output[0].numel()

    with torch.device("meta"):
        model = architecture.build(shape, 200 if shape == TINY else 10).eval()
        for layer in model:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(count)
        model(torch.empty(1, *shape))
    assert found / 1e6 == pytest.approx(millions, abs=precision)


def test_cnn7_at_64_pixels():
    """The fifth convolution has stride 2, and only there."""
    for architecture, stride, flat in ((Cnn7(width=2), 2, 1024), (Cnn7(width=2, last_stride=1), 1, 4096)):
        model = architecture.build(TINY, 7).eval()
        fifth = [layer for layer in model if isinstance(layer, nn.Conv2d)][4]
        assert fifth.stride == (stride, stride) and model[16].in_features == flat
        assert model(torch.rand(2, *TINY)).shape == (2, 7)
    strided = Cnn7(width=2, hidden=3, last_stride=2).build(CIFAR, 10)
    assert strided[12].stride == (2, 2) and strided[16].in_features == 4 * 8 * 8


def test_gowal_large_is_described_by_its_padding():
    same, valid = Cnn7(batch_norm=False).layers(MNIST, 10), Gowal(size="large").layers(MNIST, 10)
    assert [type(layer) for layer in same] == [type(layer) for layer in valid]
    assert {layer.padding for layer in valid if isinstance(layer, nn.Conv2d)} == {(0, 0)}


ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (1 + torch.exp(2 * x)),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "softplus": lambda x: torch.log(1 + torch.exp(x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    """Between all hidden layers, none behind the last one; the weights are those of the ReLU net."""
    torch.manual_seed(0)
    model = Cnn3(width=3, hidden=5, batch_norm=False, activation=name).build((1, 8, 8), 4).double()
    torch.manual_seed(0)
    usual = Cnn3(width=3, hidden=5, batch_norm=False).build((1, 8, 8), 4).double()
    x = images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    first, second, hidden, last = (layer for layer in usual if isinstance(layer, (nn.Conv2d, nn.Linear)))
    x = ACTIVATIONS[name](F.conv2d(x, first.weight, first.bias, stride=2, padding=2))
    x = ACTIVATIONS[name](F.conv2d(x, second.weight, second.bias, stride=2, padding=1))
    x = ACTIVATIONS[name](x.flatten(1) @ hidden.weight.T + hidden.bias)
    torch.testing.assert_close(model(images), x @ last.weight.T + last.bias)


@walk("name", ACTIVATIONS)
@every_model
def test_every_model_takes_every_activation(kind, name):
    fields = {name: 4 for name in ("width",) if hasattr(kind, name)}
    architecture = kind(**fields, activation=name)
    assert structure(Architecture, unstructure(architecture)) == architecture
    with torch.device("meta"):
        model = architecture.build(MNIST, 10)
    kinds = {type(layer).__name__.lower() for layer in model.modules()}
    spelled = {"leaky_relu": "leakyrelu"}.get(name, name)
    before_average = {"relu"} if (kind, name) == (PreActResNet, "softplus") else set()
    found = kinds & {"relu", "leakyrelu", "sigmoid", "tanh", "gelu", "silu", "softplus"}
    assert found == {spelled} | before_average


def sha256(model: nn.Module) -> str:
    digest = hashlib.sha256(str(model).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]


def test_weights_of_a_seed_stay_what_they_were():
    """Layers, their names and the order in which they draw, against nets that are written out here."""
    for batch_norm in (True, False):
        for mean in ((), (0.5,)):
            std = (0.25,) * len(mean)
            torch.manual_seed(3)
            layers = [nn.Conv2d(1, 6, 4, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
            layers += [nn.Conv2d(6, 12, 4, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten()]
            layers += [nn.Linear(48, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 10)]
            kept = [layer for layer in layers if batch_norm or not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
            expected = nn.Sequential(*([Normalise(mean, std)] if mean else []), *kept)
            torch.manual_seed(3)
            architecture = SmallCnn(width=6, hidden=7, batch_norm=batch_norm, mean=mean, std=std)
            assert sha256(architecture.build((1, 8, 8), 10)) == sha256(expected)


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
    model = kind(**fields, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 0.25)).build((3, 32, 32), 7)
    assert plain.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert names(model) == ["Normalise", *names(plain)]
    assert size(model) == size(plain)  # mean and std are no parameters …
    assert {"0.mean", "0.std"} <= set(model.state_dict())  # … but travel with the weights


def test_normalise():
    images = torch.rand(2, 3, 4, 5)
    found = Normalise((0.1, 0.2, 0.3), (0.5, 1.0, 0.25))(images)
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 1.0), (0.3, 0.25))):
        torch.testing.assert_close(found[:, channel], (images[:, channel] - mean) / std)


@pytest.mark.parametrize(
    ("architecture", "shape", "named"),
    [
        (Cnn7(), (3, 56, 56), "56×56.*accepted: 28×28, 32×32 or 64×64"),
        (Cnn7(), (1, 28, 32), "28×32"),
        (Cnn7(), (1, 8, 8), "8×8"),
        (SmallCnn(), (1, 3, 8), "3×8.*accepted: 4×4"),
        (Cnn3(), (1, 2, 2), "model.type Cnn3: found images of 2×2.*accepted: 3×3 or larger"),
        (Cnn5(), (1, 8, 3), "8×3.*accepted: 4×4 or larger"),
        (Gowal(size="medium"), (1, 15, 28), "15×28.*accepted: 16×16 or larger"),
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
        (lambda: Cnn7(last_stride=3), "last_stride"),
        (lambda: Cnn7(more=-1), "more"),
        (lambda: Cnn5(growth=0), "growth"),
        (lambda: Cnn3(hidden=0), "hidden"),
        (lambda: Gowal(size="huge"), "size"),
        (lambda: ResNet(blocks=()), "blocks"),
        (lambda: ResNet(blocks=(1, 0)), "blocks"),
        (lambda: ResNet(head="max"), "head"),
        (lambda: Mlp(activation="swish"), "activation"),
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


def test_shi_initialisation_counts_conv1d():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 400, 5), nn.Flatten(), nn.Linear(400, 4))
    try:
        initialise_for_ibp(model)
    except UnsupportedOperation as error:
        pytest.skip(f"needs a bound rule for Conv1d: {error}")
    sigma = math.sqrt(2 * math.pi) / 15
    assert float(model[0].weight.detach().std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * 6000))


class Sums(nn.Module):
    """Sums in every place that matters: each layer says whether it reads one."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.behind_activation, self.behind_both, self.at_once = (nn.Conv2d(2, 2, 1) for _ in range(3))
        self.after, self.last = nn.Conv2d(2, 2, 1), nn.Linear(32, 3)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.one(x) + self.two(x))  # two branches that read the stem
        x = self.behind_activation(x)  # yes
        x = torch.relu(self.norm(x - self.stem(x)))
        x = self.behind_both(x)  # yes: a difference adds up widths too
        x = self.at_once(x + x)  # yes
        x = self.after(x + 1)  # no: one branch and a constant
        return self.last(torch.relu(x).flatten(1))


def test_layers_that_read_sums_are_found_and_halved():
    torch.manual_seed(0)
    model = Sums()
    expected = [model.behind_activation, model.behind_both, model.at_once]
    assert fed_by_sums(model) == expected
    torch.manual_seed(1)
    initialise_for_ibp(model)
    torch.manual_seed(1)
    for layer in list(model.modules())[1:-1]:
        if isinstance(layer, nn.Conv2d) and layer is not model.last:
            drawn = torch.empty_like(layer.weight).normal_(std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
            assert torch.equal(layer.weight, drawn / 2 if layer in expected else drawn)


def test_a_last_layer_that_reads_a_sum_keeps_half_of_torchs_default():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(torch.relu(x + self.one(x)))

    model = Model()
    before = model.last.weight.detach().clone()
    initialise_for_ibp(model)
    assert torch.equal(model.last.weight, before / 2)


@pytest.mark.parametrize("shape", [MNIST, CIFAR, (1, 8, 8), (2, 9, 13)])
@pytest.mark.parametrize("head", ["flatten", "average"])
def test_resnet(head, shape):
    """Against its definition, and which layers are halved: those behind a block, the shortcut's included."""
    torch.manual_seed(0)
    model = ResNet(width=3, blocks=(2, 1), head=head, hidden=5).build(shape, 4).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = images = torch.rand(2, *shape)
    x = torch.relu(model[1](model[0](x)))
    for block, stride in ((model[3], 1), (model[4], 1), (model[5], 2)):
        conv, norm, _, again, last = block.branch
        assert conv.stride == (stride, stride) and again.stride == (1, 1)
        x = torch.relu(last(again(torch.relu(norm(conv(x))))) + block.shortcut(x))
    assert [len(list(model[place].shortcut.parameters())) for place in (3, 4, 5)] == [0, 0, 4]
    assert model[5].shortcut[0].kernel_size == (1, 1)
    assert x.shape[1:] == (6, -(-shape[1] // 2), -(-shape[2] // 2))
    x = model[7:](x.flatten(1)) if head == "flatten" else model[-1](x.mean((2, 3)))
    torch.testing.assert_close(model(images), x)
    assert fed_by_sums(model) == [model[4].branch[0], model[5].branch[0], model[5].shortcut[0]]


def test_resnet_counted_by_hand():
    def conv(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + outputs + 2 * outputs  # bias, batch norm

    wanted = conv(3, 32, 3) + 2 * conv(32, 32, 3)
    wanted += conv(32, 64, 3) + conv(64, 64, 3) + conv(32, 64, 1)
    wanted += conv(64, 128, 3) + conv(128, 128, 3) + conv(64, 128, 1)
    assert size(ResNet().build(CIFAR, 10)) == wanted + 128 * 10 + 10
    flat = 128 * 8 * 8 * 512 + 512 + 2 * 512 + 512 * 10 + 10
    assert size(ResNet(head="flatten").build(CIFAR, 10)) == wanted + flat


def test_interval_bounds_train_a_resnet():
    """The worst case of its bounds improves over a few steps from Shi's initialisation, until most are verified."""
    torch.manual_seed(0)
    model = ResNet(width=4, blocks=(1, 1)).build((1, 8, 8), 3)
    initialise_for_ibp(model)
    labels = torch.arange(24) % 3
    images = (0.2 + 0.3 * labels[:, None, None, None] + 0.05 * torch.rand(24, 1, 8, 8)).clamp(0, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        model.train()
        model(images)  # moves the running statistics, which the bounds below rest on
        bounds = compute_bounds(model, Interval.box(images, 0.02))
        worst = torch.where(F.one_hot(labels, 3).bool(), bounds.lower, bounds.upper)
        losses.append(F.cross_entropy(worst, labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < 0.5 * float(losses[0].detach())
    assert float((worst.argmax(1) == labels).float().mean()) > 0.9
