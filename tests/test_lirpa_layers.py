"""Every operation that the stage ``lirpa`` takes from auto_LiRPA, against all corners of small boxes and points inside
them; and those whose bounds are wrong, which are refused."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from networks import Apply, points_inside, randomise_norms
from torch import nn

from certtrain.bounds import Box
from certtrain.errors import InputError
from certtrain.verifiers.lirpa import METHODS, PATCHES, RIGHT, _TorchSubstitutes, lirpa_rows, require

VECTOR, IMAGE, CHANNELS, SEQUENCE = (4,), (1, 3, 3), (2, 2, 2), (2, 4)
KERNEL = torch.tensor([[[[1.0, -2.0], [0.5, -0.3]]]])


def halves(x):
    return x[:, :2], x[:, 2:]


def square(x):
    return x.reshape(-1, 2, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        tokens = square(x)
        scores = self.query(tokens) @ self.key(tokens).transpose(1, 2) / 2**0.5
        return torch.softmax(scores, -1) @ self.value(tokens)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)
        )

    def forward(self, x):
        return torch.relu(x + self.block(x))


ANY = {
    "relu": torch.relu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.3),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "arctangent": torch.atan,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "exp": torch.exp,
    "square": lambda x: x * x,
    "torch.square": torch.square,
    "cube": lambda x: x**3,
    "fifth power": lambda x: x**5,
    "cube by products": lambda x: x * x * x,
    "abs": torch.abs,
    "negative": torch.neg,
    "x (1 - x)": lambda x: x * (1 - x),
    "1 / (1 + x²)": lambda x: 1 / (1 + x * x),
    "√(1 + x²)": lambda x: torch.sqrt(1 + x * x),
    "log(1 + x²)": lambda x: torch.log(1 + x * x),
    "/ constant": lambda x: x / -3.0,
    "maximum with a constant": lambda x: torch.maximum(x, torch.full_like(x, 0.3)),
    "product": lambda x: halves(x)[0] * halves(x)[1].tanh(),
    "quotient": lambda x: x / (1 + x * x).sum(1, keepdim=True),
    "matmul": lambda x: square(x) @ square(x),
    "matmul of three": lambda x: square(x) @ square(x) @ square(x),
    "matmul transposed": lambda x: square(x) @ torch.relu(square(x)).transpose(1, 2),
    "softmax": lambda x: torch.softmax(x, 1),
    "softmax of rows": lambda x: torch.softmax(square(x), -1),
    "softmax of columns": lambda x: torch.softmax(square(x), 1),
    "sum": lambda x: square(x).sum(1),
    "mean": lambda x: square(x).mean(2),
    "layer norm": lambda x: F.layer_norm(x, (4,), eps=0.1),
    "maximum": lambda x: torch.maximum(*halves(x)),
    "minimum": lambda x: torch.minimum(*halves(x)),
    "concat": lambda x: torch.cat([square(x), torch.tanh(square(x))], 2),
    "stack": lambda x: torch.stack([x, torch.relu(x)], 1),
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "slice": lambda x: x[:, 1:3],
    "index": lambda x: x[:, [3, 0, 0]],
    "transpose": lambda x: square(x).transpose(1, 2),
    "permute": lambda x: square(x)[:, None].permute(0, 3, 1, 2),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, -1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "softplus": F.softplus,
    "greatest": lambda x: x.amax(1, keepdim=True),
    "least": lambda x: x.amin(1, keepdim=True),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "residual": lambda x: x + torch.relu(x),
}
POSITIVE = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "quotient of positives": lambda x: halves(x)[0] / halves(x)[1],
    "power 0.5": lambda x: x**0.5,
    "power 1.5": lambda x: x**1.5,
    "x log x": lambda x: x * torch.log(x),
}
IMAGES = {
    "max pool": lambda x: F.max_pool2d(x, 2),
    "max pool 3": lambda x: F.max_pool2d(x, 3),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "average pool, stride 1": lambda x: F.avg_pool2d(x, 2, 1),
    "average pool, padded": lambda x: F.avg_pool2d(x, 2, 2, 1),
    "average pool, stride 2, padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average pool, oblong": lambda x: F.avg_pool2d(x, (1, 3), (1, 1), (0, 1)),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive average pool of columns": lambda x: F.adaptive_avg_pool2d(x, (1, 3)),
    "mean of places": lambda x: x.mean((2, 3)),
    "circular padding": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), KERNEL.to(x.dtype)),
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
}
MODULES = {
    "linear": (lambda: nn.Linear(4, 3), VECTOR),
    "batch norm": (lambda: nn.BatchNorm1d(4), VECTOR),
    "attention": (Attention, VECTOR),
    "conv1d": (lambda: nn.Conv1d(2, 2, 2), SEQUENCE),
    "conv1d, padded, stride": (lambda: nn.Conv1d(2, 2, 2, stride=2, padding=1), SEQUENCE),
    "conv1d, dilated, groups": (lambda: nn.Conv1d(2, 4, 2, dilation=2, groups=2), SEQUENCE),
    "batch norm 2d": (lambda: nn.BatchNorm2d(2), CHANNELS),
    "groups": (lambda: nn.Conv2d(2, 4, 2, groups=2, padding=1), CHANNELS),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(2, 2, 2, groups=2, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 1)),
                  CHANNELS),
    "residual block": (Residual, CHANNELS),
    "transposed": (lambda: nn.ConvTranspose2d(1, 2, 2, stride=2, padding=1), (1, 2, 3)),
    **{
        f"conv2d {options}": (
            lambda options=options: nn.Sequential(
                nn.Conv2d(1, 2, 2, **options), nn.ReLU(), nn.Conv2d(2, 2, 2, padding=1)
            ),
            IMAGE,
        )
        for options in (
            {}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 1}, {"padding": 2, "stride": 3},
            {"stride": (1, 2), "padding": (1, 0)}, {"dilation": (1, 2), "padding": (0, 1)}, {"bias": False},
            {"padding": 1, "padding_mode": "circular"},
        )
    },
    **{
        f"conv2d, {name}, conv2d": (
            lambda middle=middle: nn.Sequential(nn.Conv2d(1, 2, 2, padding=1), middle, nn.Conv2d(2, 2, 2, padding=1)),
            IMAGE,
        )
        for name, middle in (
            ("tanh", nn.Tanh()), ("leaky relu", nn.LeakyReLU(0.2)), ("max pool", nn.MaxPool2d(2)),
            ("average pool", nn.AvgPool2d(2)), ("average pool, padded", nn.AvgPool2d(2, 2, 1)),
            ("exp", Apply(lambda module, x: torch.exp(x))), ("square", Apply(lambda module, x: x * x)),
            ("relu + 0.1", Apply(lambda module, x: torch.relu(x) + 0.1)),
        )
    },
}  # fmt: skip
LAYERS = {
    **{name: (lambda f=f: Apply(lambda module, x: f(x)), VECTOR, "any") for name, f in ANY.items()},
    **{name: (lambda f=f: Apply(lambda module, x: f(x)), VECTOR, "positive") for name, f in POSITIVE.items()},
    **{name: (lambda f=f: Apply(lambda module, x: f(x)), IMAGE, "any") for name, f in IMAGES.items()},
    **{name: (make, shape, "any") for name, (make, shape) in MODULES.items()},
}
"""What makes each, the shape it takes, and of which sign."""

WRONG = {
    "Pow": [(lambda x, n=n: x**n, VECTOR) for n in (2, 4, 6)],
    "Cos": [(torch.cos, VECTOR)],
    "Sin": [(torch.sin, VECTOR)],
    "Tan": [(lambda x: torch.tan(x / 3), VECTOR)],
    "Tile": [(lambda x: x.repeat(1, 2), VECTOR)],
    "LeakyRelu": [(lambda x, s=slope: F.leaky_relu(x, s), VECTOR) for slope in (1.5, -0.5)],
    "MaxPool": [
        (lambda x: F.max_pool2d(x, 2, 2, 1), IMAGE),
        (lambda x: F.max_pool2d(x, 3, 3, 1), IMAGE),
        (lambda x: F.max_pool2d(x, 2, 2, 1, ceil_mode=True), IMAGE),
        (lambda x: F.max_pool2d(x, 2, 2, 1), CHANNELS),
        (lambda x: F.max_pool2d(x, 2, 1, 0, 2), IMAGE),
        (lambda x: F.max_pool2d(x, 2, 2, 0, ceil_mode=True), IMAGE),
    ],
    "AveragePool": [
        (lambda x: F.avg_pool2d(x, 2, 2, 1, count_include_pad=False), IMAGE),
        (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), IMAGE),
        (lambda x: F.avg_pool2d(x, (1, 3), 1, (0, 1), count_include_pad=False), IMAGE),
        (lambda x: F.avg_pool2d(x, 2, 2, 0, ceil_mode=True), IMAGE),
    ],
    "evaluates otherwise than it runs": [
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), IMAGE),
        (lambda x: F.softplus(x, threshold=1.0), VECTOR),
    ],
}


class Around(nn.Module):
    """The layer alone before a linear one, or between others: behind a mixing one, or one of ReLUs and a constant."""

    def __init__(self, layer: nn.Module, shape, where: str):
        super().__init__()
        mixing = {1: nn.Linear, 2: nn.Conv1d, 3: nn.Conv2d}[len(shape)]
        mix = mixing(shape[0], shape[0], **({} if len(shape) == 1 else {"kernel_size": 3, "padding": 1}))
        self.before = {
            "alone": nn.Identity(),
            "mixed": mix,
            "behind relu": nn.Sequential(mix, nn.ReLU(), Apply(lambda module, x: x + 0.1)),
        }[where]
        self.layer = layer
        with torch.no_grad():
            width = layer.eval()(torch.rand(2, *shape) + 0.5).flatten(1).shape[1]
        tail = [nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 3)]
        self.after = nn.Sequential(*(tail if where != "alone" else [nn.Linear(width, 4)]))

    def forward(self, x):
        return self.after(self.layer(self.before(x)).flatten(1))


def network(make, shape, where: str, sign: str = "any", dtype=torch.float64) -> nn.Module:
    torch.manual_seed(7)
    model = Around(randomise_norms(make()), shape, where)
    if sign == "positive":
        for weights in model.before.parameters():
            weights.data.abs_()
    return model.to(dtype).eval()


def boxes(shape, sign: str, dtype=torch.float64, seed: int = 3) -> Box:
    """Below 0, above 0, around 0, wide, with ends at 0, narrow."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for kind in ("above", "narrow above", "wide above") if sign == "positive" else (
        "below", "above", "around", "wide", "touching", "narrow"
    ):  # fmt: skip
        first, second = torch.rand(2, math.prod(shape), generator=generator, dtype=dtype)
        lower, upper = {
            "below": (-2 - first, -1.5 + second),
            "above": (0.3 + first, 1.4 + second),
            "around": (-1.2 * first - 0.05, 1.2 * second + 0.05),
            "wide": (-4 * first - 0.5, 4 * second + 0.5),
            "touching": (-first, second),
            "narrow": (2 * first - 1, 2 * first - 1 + 0.05 * second),
            "narrow above": (0.3 + first, 0.3 + first + 0.05 * second),
            "wide above": (0.05 + 0.1 * first, 3 + second),
        }[kind]
        if kind == "touching":
            lower[::2], upper[1::2] = 0, 0
        drawn.append((lower, upper))
    lower, upper = (torch.stack(ends).reshape(-1, *shape) for ends in zip(*drawn, strict=True))
    return Box(lower, upper)


def forms(model, region) -> torch.Tensor:
    width = model(region.images[:1]).shape[1]
    torch.manual_seed(1)
    identity = torch.eye(width, dtype=region.images.dtype)
    rows = torch.cat([identity, -identity, torch.randn(3, width, dtype=region.images.dtype)])
    return rows.expand(len(region.images), -1, -1)


@torch.no_grad()
def least(model, region, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows over all corners, 1,500 points inside, 500 on faces, and the diagonal; and their scale."""
    lower, upper = region.lower, region.upper
    count, generator = lower[0].numel(), torch.Generator().manual_seed(5)
    share = torch.rand(2000, count, generator=generator, dtype=lower.dtype)
    share[1500:] = torch.where(share[1500:] < 0.5, share[1500:], share[1500:].round())
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)), dtype=lower.dtype)
    share = torch.cat([corners, share, torch.linspace(0, 1, 201, dtype=lower.dtype)[:, None].expand(-1, count)])
    points = (lower.flatten(1)[:, None] + share * (upper - lower).flatten(1)[:, None]).clamp(
        lower.flatten(1)[:, None], upper.flatten(1)[:, None]
    )
    logits = model(points.reshape(-1, *lower.shape[1:])).reshape(len(lower), len(share), -1)
    return (logits @ rows.transpose(1, 2)).amin(1), (logits.abs().amax(1)[:, None] @ rows.abs().transpose(1, 2))[:, 0]


@pytest.fixture(autouse=True)
def auto_lirpa():
    try:
        return require()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.lirpa
@pytest.mark.parametrize("name", LAYERS)
def test_no_point_is_below_a_bound(name):
    make, shape, sign = LAYERS[name]
    region, bounds = boxes(shape, sign), 0
    for where in ("alone", "mixed", "behind relu"):
        model = network(make, shape, where, sign)
        rows = forms(model, region)
        smallest, scale = least(model, region, rows)
        for method in METHODS:
            try:
                found = lirpa_rows(model, region, rows, method, steps=10)
            except InputError as refused:  # shapes that it cannot do: never a bound refuted, or an operation not known
                assert "cannot bound" in str(refused)
                continue
            assert (found <= smallest + 1e-8 * scale).all(), (where, method)
            bounds += int(found.isfinite().any())
    assert bounds


@pytest.mark.lirpa
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("why", WRONG)
def test_what_is_wrong_is_refused(why, method):
    for function, shape in WRONG[why]:
        model = network(lambda function=function: Apply(lambda module, x: function(x)), shape, "alone")
        region = boxes(shape, "any")
        with pytest.raises(InputError, match=f"{why}|cannot bound by"):  # by shapes that it gets wrong
            lirpa_rows(model, region, forms(model, region), method)


@pytest.mark.lirpa
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [5, 7, 8])
def test_patches_are_as_right_as_matrices(size, seed, monkeypatch):
    """Random plain convolutions: the modes' bounds agree; those by slopes, which they share otherwise, hold."""
    torch.manual_seed(seed)
    layers, channels = [], 1
    for _ in range(3):
        kernel, stride = (int(torch.randint(low, high, ())) for low, high in ((1, 4), (1, 3)))
        padding = int(torch.randint(0, kernel, ()))
        layers += [nn.Conv2d(channels, 2, kernel, stride, padding), nn.BatchNorm2d(2), nn.ReLU()]
        channels = 2
        if torch.rand(()) < 0.5:
            layers.append(Residual())
    body = randomise_norms(nn.Sequential(*layers, nn.Flatten()))
    try:
        width = body.eval()(torch.zeros(1, 1, size, size)).shape[1]
    except RuntimeError:
        pytest.skip("the image is too small for these kernels")
    model = nn.Sequential(body, nn.Linear(width, 3)).double().eval()
    images = torch.randn(3, 1, size, size, dtype=torch.float64)
    region = Box(images - 0.3, images + 0.3)
    rows = forms(model, region)
    for method in METHODS:
        patches = lirpa_rows(model, region, rows, method, steps=5)
        with monkeypatch.context() as patched:
            patched.setattr("certtrain.verifiers.lirpa.PATCHES", ())
            matrices = lirpa_rows(model, region, rows, method, steps=5)
        if method != "alpha":
            torch.testing.assert_close(patches, matrices, rtol=1e-7, atol=1e-7)
        logits = torch.stack([model(point).detach() for point in points_inside(model, region.hull)])
        assert (patches <= torch.einsum("pbk,brk->pbr", logits, rows).amin(0) + 1e-9).all()


@pytest.mark.lirpa
def test_every_operation_of_the_list_is_tried(auto_lirpa):
    seen = set()
    for make, shape, sign in LAYERS.values():
        for mode in ("alone", "behind relu"):
            model = network(make, shape, mode, sign, torch.float32)
            images = boxes(shape, sign, torch.float32).images
            try:
                with _TorchSubstitutes():
                    nodes = auto_lirpa.BoundedModule(model, images, bound_opts={"conv_mode": "matrix"}).nodes()
            except Exception:
                continue
            seen |= {type(node).__name__.removeprefix("Bound") for node in nodes}
    assert set(RIGHT) - seen == set() and set(PATCHES) < seen
