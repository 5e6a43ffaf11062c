"""Nets for small and large images: sizes as published, definitions, FLC pooling, tracing, and second derivatives."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
import yaml
from networks import Apply
from torch import nn

from certtrain.bounds import Interval, L2Ball, LinfBall, UnsupportedOperation, compute_bounds, trace
from certtrain.bounds.crown import bound_forms, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.forward import forward
from certtrain.config import structure
from certtrain.errors import InputError
from certtrain.models import (
    Architecture,
    CifarResNet,
    FrequencyLowCut,
    ImageNetResNet,
    Normalise,
    PreActResNet,
    SeNet,
    ShuffleNetV2,
    Vgg,
    WideResNet,
)

CIFAR = (3, 32, 32)
NARROW = {
    "ResNet-18": CifarResNet(width=2),
    "ResNet-50": CifarResNet(width=1, depth=50),
    "ResNet-34 for large images": ImageNetResNet(width=2),
    "PreActResNet-18": PreActResNet(width=2),
    "PreActResNet-50": PreActResNet(width=1, depth=50),
    "WideResNet": WideResNet(depth=10, width=2, widen=2, dropout=0.1),
    "WideResNet, not widened": WideResNet(depth=16, width=2, widen=1),
    "Vgg": Vgg(depth=11, width=2),
    "ShuffleNetV2": ShuffleNetV2(width=4, last=8),
    "SeNet": SeNet(width=2),
}
REFUSED = {
    "FLC": (PreActResNet(width=2, downsampling="flc"), "frequency_low_cut at .* in FrequencyLowCut at '3.branch.0.0'"),
}
every_narrow_net = pytest.mark.parametrize("name", NARROW)
every_net = pytest.mark.parametrize("name", [*NARROW, *REFUSED])


def images(*shape, count=3):
    torch.manual_seed(1)
    return torch.rand(count, *shape, dtype=torch.float64)


def trained(model: nn.Module, shape) -> nn.Module:
    """In float64 and eval mode; batch norms of any sign, with the statistics of a batch: no layer is dead."""
    model = model.double().train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.weight.data.mul_(torch.randint(2, norm.weight.shape) * 2 - 1)
        nn.init.normal_(norm.bias, std=0.5)
        norm.momentum = 1.0
    model(images(*shape, count=8))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def build(name: str, shape=CIFAR, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    architecture = NARROW[name] if name in NARROW else REFUSED[name][0]
    return trained(architecture.build(shape, classes), shape)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


PUBLISHED = [  # the line, parameters in millions as published, and exactly for ten classes
    ("{type: CifarResNet, depth: 18}", 11.17, 11_173_962),
    ("{type: CifarResNet, depth: 34}", 21.28, 21_282_122),
    ("{type: CifarResNet, depth: 50}", 23.52, 23_520_842),
    ("{type: PreActResNet, depth: 18}", 11.17, 11_172_170),  # 11 171 146 and a last batch norm
    ("{type: PreActResNet, depth: 34}", 21.28, 21_280_330),
    ("{type: PreActResNet, depth: 50}", 23.51, 23_513_162),
    ("{type: WideResNet, depth: 16, widen: 8, dropout: 0.1}", 10.96, 10_961_370),
    ("{type: WideResNet, depth: 28, widen: 10}", 36.48, 36_479_194),
    ("{type: WideResNet, depth: 34, widen: 10}", 46.16, 46_160_474),
    ("{type: SeNet, depth: 18}", 11.26, 11_260_354),
    ("{type: SeNet, depth: 34}", 21.44, 21_440_630),
    ("{type: Vgg, depth: 16}", 14.73, 14_728_266),
    ("{type: ShuffleNetV2}", 1.26, 1_263_854),
]


@pytest.mark.parametrize(("line", "millions", "parameters"), PUBLISHED)
def test_published_sizes_in_one_line(line, millions, parameters):
    architecture = structure(Architecture, yaml.safe_load(line))
    with torch.device("meta"):
        found = size(architecture.build(CIFAR, 10))
        assert found == parameters == pytest.approx(1e6 * millions, abs=5e3)
        assert size(architecture.build((1, 32, 32), 3)) < found  # FLC pooling has no weights
        if not isinstance(architecture, Vgg):
            flc = structure(Architecture, {**yaml.safe_load(line), "downsampling": "flc"})
            assert size(flc.build(CIFAR, 10)) == found


def test_sizes_by_formula():
    """Of what torchvision does not have. A pre-activation block: two norms and two 3×3, or 1×1 where shapes change."""

    def blocks(channels, width, counts, excite=lambda features: 0):
        found = 0
        for stage, count in enumerate(counts):
            features = width << stage
            for _ in range(count):
                found += 2 * channels + 9 * channels * features + 2 * features + 9 * features**2
                found += channels * features if channels != features else 0
                found += excite(features)
                channels = features
        return found

    def excite(features):
        hidden = features // 16
        return features * hidden + hidden + hidden * features + features

    def of(architecture):
        with torch.device("meta"):
            return size(architecture.build(CIFAR, 10))

    assert of(PreActResNet()) == 27 * 64 + blocks(64, 64, (2, 2, 2, 2)) + 2 * 512 + 5130
    assert of(PreActResNet(depth=34)) == 27 * 64 + blocks(64, 64, (3, 4, 6, 3)) + 2 * 512 + 5130
    assert of(SeNet()) == 27 * 64 + 2 * 64 + blocks(64, 64, (2, 2, 2, 2), excite) + 5130
    for depth, widen, each in ((16, 8, 2), (28, 10, 4), (34, 10, 5)):
        last = 64 * widen
        wanted = 27 * 16 + blocks(16, 16 * widen, (each,) * 3) + 2 * last + 10 * last + 10
        assert of(WideResNet(depth=depth, widen=widen)) == wanted


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """By position: the two nets list the same layers in the same order."""
    values, place = list(source.state_dict().values()), target.state_dict()
    assert [value.shape for value in values] == [value.shape for value in place.values()]
    target.load_state_dict(dict(zip(place, values, strict=True)))


def assert_same_net(model: nn.Module, other: nn.Module, *shape: int) -> None:
    """As functions of images, and of the batch in train mode."""
    model, other, x = trained(model, shape), other.double(), images(*shape)
    copy_state(model, other)
    torch.testing.assert_close(model(x), other.eval()(x), rtol=1e-9, atol=1e-9)
    assert float(model(x).std(0).max().detach()) > 1e-3  # the images matter
    torch.testing.assert_close(model.train()(x), other.train()(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("depth", "make"), [(18, zoo.resnet18), (50, zoo.resnet50)])
def test_resnets_are_torchvisions_but_for_the_stem(depth, make):
    torch.manual_seed(0)
    other = make(num_classes=7)
    other.conv1, other.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    assert_same_net(CifarResNet(depth=depth).build(CIFAR, 7), other, 3, 10, 8)


@pytest.mark.parametrize(("depth", "make"), [(18, zoo.resnet18), (34, zoo.resnet34), (50, zoo.resnet50)])
def test_resnets_for_large_images_are_torchvisions(depth, make):
    """As functions, at an odd size and a square one; and their sizes for a hundred classes."""
    architecture = structure(Architecture, {"type": "ImageNetResNet"} | ({} if depth == 34 else {"depth": depth}))
    with torch.device("meta"):
        found = size(architecture.build((3, 224, 224), 100))
        assert found == size(make(num_classes=100)) == {18: 11_227_812, 34: 21_335_972, 50: 23_712_932}[depth]
    if depth != 34:  # built of the blocks of 18, more of them
        torch.manual_seed(0)
        assert_same_net(architecture.build((3, 70, 49), 7), make(num_classes=7), 3, 70, 49)


@pytest.mark.parametrize(("depth", "make"), [(34, zoo.resnet34), (50, zoo.resnet50)])
def test_layers_of_deeper_resnets_are_torchvisions(depth, make):
    """Shapes and strides, but for the stem."""
    with torch.device("meta"):
        model, other = CifarResNet(depth=depth).build(CIFAR, 10), make(num_classes=10)
    ours, theirs = ([layer for layer in net.modules() if isinstance(layer, nn.Conv2d)] for net in (model, other))
    assert [layer.weight.shape for layer in ours[1:]] == [layer.weight.shape for layer in theirs[1:]]
    assert [layer.stride for layer in ours[1:]] == [layer.stride for layer in theirs[1:]]
    assert size(model) == size(other) - 3 * 64 * (7 * 7 - 3 * 3)


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_is_torchvisions_but_for_the_classifier(depth):
    torch.manual_seed(0)
    widths = {64: 2, 128: 4, 256: 8, 512: 16}
    letter = {11: "A", 13: "B", 16: "D", 19: "E"}[depth]
    plan: list = [place if place == "M" else widths[int(place)] for place in zoo.vgg.cfgs[letter]]
    features = zoo.vgg.make_layers(plan, batch_norm=True)
    other = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    assert_same_net(Vgg(depth=depth, width=2).build(CIFAR, 5), other, 3, 32, 64)


@pytest.mark.parametrize("width", [2, 6])
def test_shufflenet_is_torchvisions_but_for_the_stem(width):
    torch.manual_seed(0)
    plan = [24, width, 2 * width, 4 * width, 9]
    other = zoo.ShuffleNetV2([4, 8, 4], plan, num_classes=5)
    other.conv1[0], other.maxpool = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.Identity()
    assert_same_net(ShuffleNetV2(width=width, last=9).build(CIFAR, 5), other, 3, 18, 16)


@pytest.mark.parametrize(
    ("make", "width", "last"),
    [
        (zoo.shufflenet_v2_x0_5, 48, 1024),
        (zoo.shufflenet_v2_x1_0, 116, 1024),
        (zoo.shufflenet_v2_x1_5, 176, 1024),
        (zoo.shufflenet_v2_x2_0, 244, 2048),
    ],
)
def test_the_factors_of_shufflenet(make, width, last):
    with torch.device("meta"):
        assert size(ShuffleNetV2(width=width, last=last).build(CIFAR, 10)) == size(make(num_classes=10))


class Definition:
    """A net's layers in the order of their definition, each applied to what it is handed."""

    def __init__(self, model: nn.Module, activation=torch.relu):
        self.activation = activation
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        self.layers = [layer for layer in model.modules() if isinstance(layer, kinds)]

    def take(self, *kinds):
        layers = self.layers[: len(kinds)]
        del self.layers[: len(kinds)]
        assert [type(layer) for layer in layers] == list(kinds)
        return layers

    def norm(self, x):
        (layer,) = self.take(nn.BatchNorm2d)
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    def conv(self, x, stride=1):
        (layer,) = self.take(nn.Conv2d)
        return F.conv2d(x, layer.weight, layer.bias, stride, layer.weight.shape[-1] // 2)

    def pre_activated(self, x, stride, bottleneck=False, excite=False):
        """The shortcut is a convolution in the first block of a stage, but for one that changes nothing."""
        y = before = self.activation(self.norm(x))
        first_stride = 1 if bottleneck else stride
        y = self.activation(self.norm(self.conv(y, first_stride)))
        y = self.conv(y, stride if bottleneck else 1)
        if bottleneck:
            y = self.conv(self.activation(self.norm(y)))
        if excite:
            weights = self.conv(self.conv(y.mean((2, 3), keepdim=True)).relu())
            y = y / (1 + (-weights).exp())
        changes = y.shape[1] != x.shape[1] or stride != 1
        return y + (self.conv(before, stride) if changes else x)

    def head(self, x):
        (layer,) = self.take(nn.Linear)
        assert not self.layers
        return x.mean((2, 3)) @ layer.weight.T + layer.bias


@pytest.mark.parametrize(
    ("architecture", "counts"),
    [
        (PreActResNet(width=2), (2, 2, 2, 2)),
        (PreActResNet(width=2, depth=34), (3, 4, 6, 3)),
        (PreActResNet(width=1, depth=50), (3, 4, 6, 3)),
        (WideResNet(depth=16, width=2, widen=3, dropout=0.3), (2, 2, 2)),
        (WideResNet(depth=10, width=2, widen=1), (1, 1, 1)),
        (SeNet(width=2, reduction=2), (2, 2, 2, 2)),
        (PreActResNet(width=2, activation="softplus"), (2, 2, 2, 2)),
        (PreActResNet(width=1, depth=50, activation="softplus"), (3, 4, 6, 3)),
    ],
    ids=repr,
)
def test_pre_activation_nets_by_definition(architecture, counts):
    torch.manual_seed(0)
    model = trained(architecture.build((2, 19, 16), 5), (2, 19, 16))
    activation = (lambda x: (1 + x.exp()).log()) if architecture.activation == "softplus" else torch.relu
    layers, excite = Definition(model, activation), isinstance(architecture, SeNet)
    x = pixels = images(2, 19, 16)
    x = layers.conv(x)
    x = layers.norm(x).relu() if excite else x
    sides = []
    for stage, count in enumerate(counts):
        for block in range(count):
            x = layers.pre_activated(x, 2 if stage and not block else 1, architecture.depth == 50, excite)
        sides.append(tuple(x.shape[2:]))
    assert sides == [(19, 16), (10, 8), (5, 4), (3, 2)][: len(counts)]
    x = x if excite else layers.norm(x).relu()
    torch.testing.assert_close(model(pixels), layers.head(x), rtol=1e-10, atol=1e-10)


def test_dropout_stands_between_the_convolutions_of_a_wide_block():
    model = WideResNet(depth=10, width=2, widen=1, dropout=0.3).build(CIFAR, 3)
    found = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert [layer.p for layer in found] == [0.3] * 3
    assert [type(layer).__name__ for layer in model[1].branch] == ["Conv2d", "BatchNorm2d", "ReLU", "Dropout", "Conv2d"]
    assert not any(isinstance(layer, nn.Dropout) for layer in WideResNet(depth=10, width=2).build(CIFAR, 3).modules())


@pytest.mark.parametrize("name", [*NARROW, "SeNet"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 33, 15), (3, 64, 64), (1, 1, 2)])
def test_any_size_of_images(name, shape):
    architecture = NARROW[name] if name in NARROW else REFUSED[name][0]
    assert architecture.build(shape, 5).eval()(torch.rand(2, *shape)).shape == (2, 5)


class TestFrequencyLowCut:
    """The sampling theorem, in float64."""

    def layer(self, x):
        return FrequencyLowCut()(x)

    def waves(self, height, width, vertical, horizontal, phase=0.3):
        rows, columns = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
        angle = 2 * torch.pi * (vertical * rows[:, None] / height + horizontal * columns / width)
        return (angle + phase).cos()

    @pytest.mark.parametrize("shape", [(2, 3, 8, 12), (4, 4), (1, 32, 32)])
    def test_means_are_kept(self, shape):
        x = torch.randn(shape, dtype=torch.float64)
        found = self.layer(x)
        assert found.shape == (*shape[:-2], shape[-2] // 2, shape[-1] // 2) and found.dtype == x.dtype
        assert not found.is_complex()
        torch.testing.assert_close(found.mean((-2, -1)), x.mean((-2, -1)), rtol=0, atol=1e-12)
        constant = torch.full(shape, 0.7, dtype=torch.float64)
        torch.testing.assert_close(self.layer(constant), constant[..., ::2, ::2], rtol=0, atol=1e-12)

    def test_low_frequencies_are_sub_sampled_and_high_ones_vanish(self):
        """Every wave of an 8×12 image but those of a quarter of the sampling rate, where the kept half is lopsided."""
        seen = {True: 0, False: 0}
        for vertical in range(-4, 5):
            for horizontal in range(-6, 7):
                if abs(vertical) == 2 or abs(horizontal) == 3:
                    continue
                x = self.waves(8, 12, vertical, horizontal)
                low = abs(vertical) < 2 and abs(horizontal) < 3
                wanted = x[::2, ::2] if low else torch.zeros(4, 6, dtype=torch.float64)
                torch.testing.assert_close(self.layer(x), wanted, rtol=0, atol=1e-12)
                seen[low] += 1
        assert seen == {True: 15, False: 62}

    def test_striding_would_alias(self):
        checkers = self.waves(8, 8, 4, 4, phase=0)
        assert torch.equal(checkers[::2, ::2], torch.ones(4, 4, dtype=torch.float64))
        assert float(self.layer(checkers).abs().max()) < 1e-12

    def test_at_a_quarter_of_the_sampling_rate_the_real_part_stays(self):
        """The kept half holds -1/4 and not +1/4: half of a cosine."""
        x = self.waves(8, 8, 2, 0, phase=0)
        torch.testing.assert_close(self.layer(x), x[::2, ::2] / 2, rtol=0, atol=1e-12)

    def test_is_linear_and_equals_a_sum_over_frequencies(self):
        x, y = images(8, 12), images(8, 12).flip(0).square()
        torch.testing.assert_close(self.layer(2 * x - 3 * y), 2 * self.layer(x) - 3 * self.layer(y))
        rows = torch.arange(8, dtype=torch.float64)[:, None]
        columns = torch.arange(12, dtype=torch.float64)
        wanted = torch.zeros(3, 4, 6, dtype=torch.complex128)
        for vertical in range(-2, 2):
            for horizontal in range(-3, 3):
                wave = torch.exp(2j * torch.pi * (vertical * rows / 8 + horizontal * columns / 12))
                coefficient = (x * wave.conj()).mean((1, 2), keepdim=True)
                wanted += coefficient * wave[::2, ::2]
        torch.testing.assert_close(self.layer(x), wanted.real, rtol=0, atol=1e-12)

    def test_second_derivatives(self):
        x = images(2, 4, 8, count=1).requires_grad_()
        assert torch.autograd.gradcheck(FrequencyLowCut(), x)
        assert torch.autograd.gradgradcheck(lambda t: self.layer(t).pow(3), x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        x = images(3, 8, 8).to(dtype)
        found = self.layer(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, self.layer(x.float()).to(dtype), rtol=0, atol=0)

    @pytest.mark.parametrize("sides", [(6, 8), (8, 6), (7, 4)])
    def test_sides_that_do_not_fit_are_refused(self, sides):
        with pytest.raises(InputError, match=f"found images of {sides[0]}×{sides[1]}; accepted: .* multiples of 4"):
            self.layer(torch.rand(1, *sides))


FAMILIES = {
    "ResNet": (CifarResNet, {"width": 2}, 16),
    "ResNet for large images": (ImageNetResNet, {"width": 2}, 64),
    "PreActResNet-18": (PreActResNet, {"width": 2}, 16),
    "PreActResNet-50": (PreActResNet, {"width": 1, "depth": 50}, 16),
    "WideResNet": (WideResNet, {"depth": 10, "width": 2, "widen": 2}, 8),
    "SeNet": (SeNet, {"width": 2}, 16),
    "ShuffleNetV2": (ShuffleNetV2, {"width": 4}, 16),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_flc_pooling_replaces_every_stride(name):
    """Layer by layer: the same weights, and a pool before each convolution that had stride 2."""
    kind, fields, multiple = FAMILIES[name]
    torch.manual_seed(0)
    shape = (3, 2 * multiple, multiple)
    strided = kind(**fields).build(shape, 4).double().eval()
    torch.manual_seed(0)
    model = kind(**fields, downsampling="flc").build(shape, 4).double().eval()
    convolutions = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (strided, model)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(*convolutions, strict=True))
    halving = [a.stride == (2, 2) for a in convolutions[0]]
    pools = [m for m in model.modules() if isinstance(m, FrequencyLowCut)]
    assert len(pools) == sum(halving) >= 2
    assert all(layer.stride == (1, 1) for layer in convolutions[1])
    for module in model.modules():
        for place, layer in enumerate(module) if isinstance(module, nn.Sequential) else ():
            if isinstance(layer, FrequencyLowCut):
                assert isinstance(module[place + 1], nn.Conv2d) and len(module) == 2
    x = images(*shape, count=2)
    assert model(x).shape == (2, 4) and not torch.allclose(model(x), strided(x))

    kind(**fields, downsampling="flc").build((3, multiple, 3 * multiple), 4)
    for shape in ((3, multiple, multiple + 4), (3, multiple // 2, multiple), (1, 28, 28)):
        found = f"{shape[1]}×{shape[2]}"
        with pytest.raises(
            InputError, match=f"model.downsampling flc: found images of {found}.*multiples of {multiple}"
        ):
            kind(**fields, downsampling="flc").build(shape, 4)


@every_narrow_net
def test_programs_are_the_nets(name):
    """In eval and in train mode, with the running statistics that a batch leaves; and folded."""
    model = build(name, (3, 16, 16))
    x = images(3, 16, 16)
    wanted = model(x)
    torch.testing.assert_close(forward(model, x).logits, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fold(model, x.shape[1:])(x), wanted, rtol=1e-9, atol=1e-9)
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()  # it draws
    other = copy.deepcopy(model)
    torch.testing.assert_close(forward(model, x).logits, other(x), rtol=1e-8, atol=1e-8)
    for found, expected in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_narrow_net
@pytest.mark.parametrize("ball", [LinfBall(1e-6), LinfBall(0.1), L2Ball(1e-3)], ids=repr)
def test_bounds_hold_the_values_of_points(name, ball):
    """At random points, and at those which a gradient says are worst."""
    model = build(name, (3, 16, 16))
    x = 0.2 + 0.6 * images(3, 16, 16, count=2)
    bounds = compute_bounds(model, ball.region(x))
    assert bounds.center.isfinite().all() and (bounds.radius > 0).all()
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
    directions = [slope, -slope, slope.sign(), -slope.sign(), *torch.randn(6, *x.shape, dtype=x.dtype)]
    points = torch.stack([ball.project(x, x + direction / direction.abs().mean()) for direction in directions])
    assert all(ball.contains(x, candidates, 1e-12).all() for candidates in points)
    logits = torch.stack([model(candidates) for candidates in points])
    assert (logits.amax(0) > logits.amin(0)).all()
    slack = 1e-9 * (1 + bounds.center.abs())
    assert (bounds.lower - slack <= logits).all() and (logits <= bounds.upper + slack).all()


@pytest.mark.parametrize("name", ["ShuffleNetV2", "PreActResNet-18"])
def test_linear_bounds_of_a_point_are_the_net(name):
    """Backwards through the folded form, slices and shuffles among it: at a point no slack hides a mistake."""
    model = build(name, (3, 8, 8))
    x = images(3, 8, 8)
    network, region = fold(model, x.shape[1:]), LinfBall(0.0).region(x)
    forms = torch.randn(3, 5, 4, dtype=x.dtype)
    found = bound_forms(network, region, forms, interval_bounds(network, region))
    torch.testing.assert_close(found, (forms @ model(x).unsqueeze(2)).squeeze(2), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_what_bounds_do_not_know_is_named(name):
    with pytest.raises(UnsupportedOperation, match=REFUSED[name][1]):
        trace(build(name))


class Start(nn.Module):
    """A diagonal layer, ``function`` of its output, and a linear layer on what is flattened."""

    def __init__(self, function, features):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Conv2d(4, 4, 1, groups=4)
        self.function, self.last = Apply(function, shuffle=nn.ChannelShuffle(2)), nn.Linear(features, 3)

    def forward(self, x):
        return self.last(self.function(self.scale(x)).flatten(1))


REARRANGED = {
    "x[:, 1:3]": (lambda m, x: x[:, 1:3], [0, 1, 2, 3][1:3]),
    "x[:, -1:]": (lambda m, x: x[:, -1:], [3]),
    "x[:, ::2]": (lambda m, x: x[:, ::2], [0, 2]),
    "x[:]": (lambda m, x: x[:], [0, 1, 2, 3]),
    "shuffle": (lambda m, x: m.shuffle(x), [0, 2, 1, 3]),
    "shuffled slice": (lambda m, x: m.shuffle(x)[:, 1:3], [2, 1]),
    "x[:, 2]": (lambda m, x: x[:, 2], [2]),
    "x[:, None]": (lambda m, x: x[:, None], [0, 1, 2, 3]),
    "x[..., :2, :, :]": (lambda m, x: x[..., :2, :, :], [0, 1]),
}


@pytest.mark.parametrize("name", REARRANGED)
def test_bounds_of_slices_and_shuffles_are_exact(name):
    """The input interval of the last layer is the box of the scaled channels, in their new order."""
    function, order = REARRANGED[name]
    model = Start(function, 6 * len(order)).double()
    x, radius = images(4, 3, 2), images(4, 3, 2).flip(0)
    weight, bias = (value.reshape(1, 4, 1, 1) for value in (model.scale.weight, model.scale.bias))
    center = (x * weight + bias)[:, order].flatten(1)
    spread = (radius * weight.abs())[:, order].flatten(1)
    for found in (compute_bounds(model, Interval(x, radius)), _folded_bounds(model, Interval(x, radius))):
        torch.testing.assert_close(found.center, model.last(center), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.radius, spread @ model.last.weight.abs().T, rtol=1e-12, atol=1e-12)


def _folded_bounds(model: nn.Module, box: Interval) -> Interval:
    values = [box]
    for operation in fold(model, box.center.shape[1:]).operations[1:]:
        values.append(operation.interval(*(values[read] for read in operation.inputs)))
    return values[-1]


@pytest.mark.parametrize("index", [0, slice(2), None, (), ([0],), (slice(None), [0])])
def test_other_indices_are_refused(index):
    with pytest.raises(UnsupportedOperation, match=r"'getitem': found x.*accepted: x\[:, …\]"):
        trace(Start(lambda m, x: x[index], 6))


def test_a_slice_that_changes_what_others_read_is_refused():
    model = Start(lambda m, x: torch.cat([x[:, :2].relu_(), x], 1), 36)
    with pytest.raises(UnsupportedOperation, match="relu_ at 'relu_' changes 'scale' in place while others read it"):
        trace(model)
    trace(Start(lambda m, x: x[:, :2].relu_(), 12))


def test_images_are_not_shuffled_or_sliced_before_the_first_layer_over_a_ball():
    """That layer takes its input for the image; over a box a slice is harmless."""
    for before in (nn.Identity(), Normalise((0.1,) * 4, (2.0,) * 4), Apply(lambda m, x: x[:, :2])):
        with pytest.raises(UnsupportedOperation, match="ChannelShuffle at '1' has no bound rule"):
            trace(nn.Sequential(before, nn.ChannelShuffle(2), nn.Flatten(), nn.LazyLinear(3)))
    model = nn.Sequential(Apply(lambda m, x: x[:, 2:]), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(18, 3)).double()
    x = images(4, 3, 2)
    with pytest.raises(UnsupportedOperation, match="as the first layer over"):
        compute_bounds(model, L2Ball(0.1).region(x))
    found = compute_bounds(model, Interval.point(x))
    torch.testing.assert_close(found.center, model(x))


@pytest.mark.parametrize("padding", ["same", "circular", "reflect"])
def test_a_slice_that_is_padded_to_the_images_size_is_not_taken_for_the_image(padding):
    around = {"padding": (1, 0), "padding_mode": padding} if padding != "same" else {"padding": padding}
    sliced, layer = Apply(lambda m, x: x[:, :, 2:]), nn.Conv2d(2, 3, (3, 1), **around)
    model = nn.Sequential(sliced, layer, nn.Flatten(), nn.Linear(24, 3)).double()
    x = images(2, 6, 2)
    with pytest.raises(UnsupportedOperation, match="as the first layer over L2Ball: found an input of shape"):
        compute_bounds(model, L2Ball(0.1).region(x))


def test_a_channel_that_constants_repeat_is_not_taken_for_the_image():
    gains = torch.tensor([1.0, 2, 3]).reshape(3, 1, 1)
    model = nn.Sequential(
        Apply(lambda m, x: x[:, :1] * m.gains), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    model[0].register_buffer("gains", gains.double())
    with pytest.raises(UnsupportedOperation, match=r"found an input of shape \(1, 4, 4\); accepted: the image's own"):
        compute_bounds(model, L2Ball(0.1).region(images(3, 4, 4)))


@every_net
def test_second_derivatives_in_train_mode(name):
    """GradAlign's and Fast-BAT's: every weight gets a finite gradient of the images' gradient, and some a non-zero."""
    side = 64 if "large" in name else 16  # at a last image of one pixel most weights of its 3×3 layers do nothing
    model = build(name, (3, side, side)).train()
    x, labels = images(3, side, side, count=4).requires_grad_(), torch.arange(4)
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x, create_graph=True)
    assert (slope != 0).any()
    slope.square().sum().backward()
    gradients = {path: parameter.grad for path, parameter in model.named_parameters()}
    last = [path for path in gradients if gradients[path] is None]
    assert all(path.endswith("bias") for path in last)  # what shifts everything alike
    found = torch.cat([gradient.flatten() for gradient in gradients.values() if gradient is not None])
    assert found.isfinite().all() and (found != 0).double().mean() > 0.5
    assert gradients[next(iter(gradients))].abs().max() > 0  # the first convolution's


@pytest.mark.parametrize("name", ["PreActResNet-18", "ResNet-18", "ShuffleNetV2", "Vgg"])
def test_second_derivatives_of_the_program(name):
    model = build(name, (3, 16, 16)).train()
    x, labels = images(3, 16, 16, count=4).requires_grad_(), torch.arange(4)
    found = []
    for run in (model, lambda x: forward(model, x, twice=True).logits):  # one after the other: both move the statistics
        (slope,) = torch.autograd.grad(F.cross_entropy(run(x), labels), x, create_graph=True)
        weights = [parameter for path, parameter in model.named_parameters() if path.endswith("weight")]
        found.append(torch.autograd.grad(slope.square().sum(), weights))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * float(one.abs().max()) + 1e-12)


def test_second_derivatives_are_those_of_differences():
    """A mixed derivative of a smooth pre-activation net with FLC pooling, against a central difference."""
    torch.manual_seed(0)
    architecture = PreActResNet(width=2, downsampling="flc", activation="tanh")
    model = architecture.build((3, 16, 16), 3).double().train()
    x, labels = images(3, 16, 16, count=4).requires_grad_(), torch.arange(4) % 3
    weight = model[0].weight
    direction = torch.randn_like(weight)

    def penalty(step: float):
        with torch.no_grad():
            weight.add_(step * direction)
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x, create_graph=True)
        value = slope.square().sum()
        (gradient,) = torch.autograd.grad(value, weight)
        with torch.no_grad():
            weight.sub_(step * direction)
        return float(value.detach()), float((gradient * direction).sum())

    wanted = (penalty(1e-5)[0] - penalty(-1e-5)[0]) / 2e-5
    assert penalty(0.0)[1] == pytest.approx(wanted, rel=1e-5) and abs(wanted) > 1e-6


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: CifarResNet(depth=20), "depth"),
        (lambda: PreActResNet(depth=-18), "depth"),
        (lambda: PreActResNet(width=0), "width"),
        (lambda: PreActResNet(downsampling="pool"), "downsampling"),
        (lambda: WideResNet(depth=29), "depth"),
        (lambda: WideResNet(depth=4), "depth"),
        (lambda: WideResNet(widen=0), "widen"),
        (lambda: WideResNet(dropout=1.0), "dropout"),
        (lambda: WideResNet(dropout=float("nan")), "dropout"),
        (lambda: SeNet(depth=50), "depth"),
        (lambda: SeNet(reduction=0), "reduction"),
        (lambda: Vgg(depth=18), "depth"),
        (lambda: Vgg(width=0), "width"),
        (lambda: ShuffleNetV2(width=5), "width"),
        (lambda: ShuffleNetV2(last=0), "last"),
    ],
)
def test_bad_fields_are_refused(build, field):
    with pytest.raises(InputError, match=f"^{field}: found .*accepted"):
        build()
