"""Small networks for the tests of bounds, and the rounding error that their bounds may have."""

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from certtrain.bounds import Interval


class Apply(nn.Module):
    """``function(module, x)`` as a forward; other arguments become attributes, tensors among them buffers."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


class Residual(nn.Module):
    """x + block(x), or x - block(x)."""

    def __init__(self, block: nn.Module, sign: int = 1):
        super().__init__()
        self.block, self.sign = block, sign

    def forward(self, x):
        return x + self.block(x) if self.sign > 0 else x - self.block(x)


class Joined(nn.Module):
    """x and block(x), one after the other along a dimension."""

    def __init__(self, block: nn.Module, dim: int = 1):
        super().__init__()
        self.block, self.dim = block, dim

    def forward(self, x):
        return torch.cat([x, self.block(x)], self.dim)


class Elementwise(nn.Module):
    """x * scale + shift per channel; scale may be negative."""

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)
        self.shift = nn.Parameter(shift)

    def forward(self, x):
        return x * self.scale + self.shift


def randomise_norms(model: nn.Module) -> nn.Module:
    """Batch norms as after training: any sign of gamma, any statistics."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def small_cnn(batch_norm: bool = True) -> nn.Module:
    """(B, 2, 6, 6) → (B, 4)."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(3), nn.BatchNorm1d(8)] if batch_norm else [nn.Identity(), nn.Identity()]
    layers = [nn.Conv2d(2, 3, 3, stride=2, padding=1), norms[0], nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(27, 8), norms[1], nn.ReLU(), nn.Linear(8, 4)]
    return randomise_norms(nn.Sequential(*layers)).double()


POINTWISE = ("relu", "leaky", "sigmoid", "tanh", "gelu", "silu", "dropout", "identity", "norm", "elementwise", "add",
             "subtract", "join")  # fmt: skip
SPATIAL = ("conv", "conv", "conv", "max_pool", "avg_pool", "adaptive", "adaptive_max")
FLAT = ("linear", "linear")


@st.composite
def networks(draw) -> nn.Module:
    """A random composition of every supported node kind, (B, 2, 6, 6) → (B, K), float64, in evaluation mode."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    shape, layers = (2, 6, 6), []
    sequence = draw(st.sampled_from([False, False, True]))
    for places, count in ((2, 2), (1, 3), (0, 4)) if sequence else ((2, 4), (0, 4)):
        if len(shape) > 1 + places:
            layers.append(nn.Flatten(1 + places))
            shape = _shape_after(layers[-1], shape)
        kinds = SPATIAL + POINTWISE if places else FLAT + POINTWISE
        for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=count)):
            layers.append(_layer(draw, kind, shape))
            shape = _shape_after(layers[-1], shape)
    if draw(st.booleans()) or not 2 <= shape[0] <= 6:  # margins are of two classes or more
        layers.append(nn.Linear(shape[0], 4))
    return randomise_norms(nn.Sequential(*layers)).double().eval()


def _shape_after(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(copy.deepcopy(layer).eval()(torch.zeros(1, *shape)).shape[1:])


def _layer(draw, kind: str, shape: tuple[int, ...]) -> nn.Module:
    channels, places = shape[0], len(shape) - 1
    match kind:
        case "relu":
            return nn.ReLU()
        case "leaky":
            return nn.LeakyReLU(draw(st.sampled_from([0.0, 0.1, 1.0])))
        case "sigmoid":
            return nn.Sigmoid()
        case "tanh":
            return nn.Tanh()
        case "gelu":
            return nn.GELU(draw(st.sampled_from(["none", "tanh"])))
        case "silu":
            return nn.SiLU()
        case "dropout":
            return nn.Dropout(0.5)
        case "identity":
            return nn.Identity()
        case "norm":
            affine = draw(st.booleans())
            return nn.BatchNorm2d(channels, affine=affine) if places > 1 else nn.BatchNorm1d(channels, affine=affine)
        case "elementwise":
            ones = (channels, *[1] * places)
            return Elementwise(torch.randn(ones), torch.randn(ones))
        case "linear":
            return nn.Linear(channels, draw(st.sampled_from([1, 3, 6])), bias=draw(st.booleans()))
        case "add" | "subtract" | "join":
            if kind == "join" and math.prod(shape) > 150:
                return nn.Identity()
            inner = _of("Conv", places)(channels, channels, 3, padding=1) if places else nn.Linear(channels, channels)
            block = nn.Sequential(inner, *([nn.ReLU()] if draw(st.booleans()) else []))
            if kind == "join":
                return Joined(block, draw(st.sampled_from([1, -1])))
            return Residual(block, 1 if kind == "add" else -1)
    small = min(shape[1:]) < 3  # too small for a stride or a dilation
    match kind:
        case "conv":
            stride = 1 if small else draw(st.sampled_from([1, 2, (2, 1)[-places:]]))
            padding = (
                draw(st.sampled_from(["same", 1, (1, 2)[-places:]])) if stride in (1, (1,)) else draw(st.integers(0, 1))
            )
            mode = "zeros" if small else draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
            dilation = 1 if min(shape[1:]) < 5 else draw(st.sampled_from([1, 2]))
            groups = draw(st.sampled_from([1, channels]))
            return _of("Conv", places)(
                channels, 2 * groups if groups > 1 else 3, 3 if padding == "same" or padding else 1 if small else 2,
                stride, padding, dilation, groups, bias=draw(st.booleans()), padding_mode=mode,
            )  # fmt: skip
        case "max_pool":
            size = 1 if small else draw(st.sampled_from([2, 3]))
            return _of("MaxPool", places)(size, stride=1, padding=0 if small else 1)
        case "avg_pool":
            include = draw(st.booleans())
            pool = _of("AvgPool", places)
            return pool(1 if small else 2, stride=1, padding=0 if small else 1, count_include_pad=include)
    pool = _of("AdaptiveMaxPool" if kind == "adaptive_max" else "AdaptiveAvgPool", places)
    return pool(draw(st.sampled_from([1, 2])))


def _of(kind: str, places: int) -> type[nn.Module]:
    """A layer's form for sequences or for images."""
    return getattr(nn, f"{kind}{places}d")


def rounding(model: nn.Module, box: Interval, dtype: torch.dtype = torch.float64) -> Tensor:
    """An a-priori bound, (B, K), of the rounding error of a network's interval bounds or of its outputs.

    To first order every rounding multiplies one summand of the output, written out as a sum over paths, by
    1 + delta with |delta| <= u. A path meets at most N roundings (``_length``), and the summands' absolute values
    add up to at most A, the network of absolute weights at |center| + radius (``_majorant``), because every
    activation is 1-Lipschitz, but GELU and SiLU, whose slopes are 1.13 at most. So the error is at most N u A; twice
    that covers second order, and twice again bounds and outputs together.
    """
    magnitude = (box.center.abs() + box.radius).detach().double()
    copied = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return 4 * (_length(copied) + 8) * (torch.finfo(dtype).eps / 2) * _majorant(copied, magnitude)


def _length(model: nn.Module) -> int:
    fan_in = sum(m.weight[0].numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)))
    return fan_in + 16 * len(list(model.modules()))  # 16: a batch norm's root and products, a pooling window of 9


def _majorant(module: nn.Module, x: Tensor) -> Tensor:
    match module:
        case nn.Sequential():
            for child in module:
                x = _majorant(child, x)
            return x
        case Residual():
            return x + _majorant(module.block, x)
        case Joined():
            return torch.cat([x, _majorant(module.block, x)], module.dim)
        case Elementwise():
            return x * module.scale.abs() + module.shift.abs()
        case nn.Linear() | nn.Conv1d() | nn.Conv2d():
            for parameter in module.parameters():
                parameter.abs_()
            return module(x)
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            shape = (-1, *[1] * (x.ndim - 2))
            scale = (module.running_var + module.eps).rsqrt() * (1 if module.weight is None else module.weight.abs())
            shift = module.running_mean.abs() * scale + (0 if module.bias is None else module.bias.abs())
            return x * scale.reshape(shape) + shift.reshape(shape)
        case nn.Sigmoid():
            return x + 1
        case nn.GELU() | nn.SiLU():
            return 1.13 * x
        case nn.ReLU() | nn.LeakyReLU() | nn.Tanh():
            return x
    return module(x)  # pooling and flatten


def points_inside(model: nn.Module, box: Interval, count: int = 4) -> list[Tensor]:
    """Points of a float64 box: random ones, random corners, and corners that sign gradients push every output to."""
    shares = [torch.rand_like(box.center) for _ in range(count)]
    points = [box.center + (2 * share - 1) * box.radius for share in shares]
    points += [box.center + torch.sign(share - 0.5) * box.radius for share in shares]
    classes = model(box.center).shape[1]
    for output, sign in itertools.product(range(classes), (-1, 1)):
        point = box.center
        for _ in range(2):
            point = point.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(sign * model(point)[:, output].sum(), point)
            point = box.center + gradient.sign() * box.radius
        points.append(point)
    return points


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - z_j, columns j != y in increasing order, row by row."""
    others = [[j for j in range(logits.shape[1]) if j != y] for y in labels.tolist()]
    return torch.stack([row[y] - row[rest] for row, y, rest in zip(logits, labels, others)])


def specification(labels: Tensor, classes: int) -> Tensor:
    """Rows e_y - e_j, (B, K - 1, K)."""
    eye = torch.eye(classes, dtype=torch.float64)
    own = F.one_hot(labels, classes).double()
    return torch.stack([o - eye[[j for j in range(classes) if j != y]] for o, y in zip(own, labels.tolist())])
