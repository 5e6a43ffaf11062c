"""The folded network is the model, and its linear operations know their adjoints."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Apply, Elementwise, Joined, Residual, networks, randomise_norms, rounding, small_cnn
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import Interval, Network, UnsupportedOperation, forward
from certtrain.bounds.folding import fold
from certtrain.bounds.operations import Input, Nonlinear, Relu

SEEDS = st.integers(0, 1000)
properties = settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHAPE = (2, 6, 7)


def make_images(count=3, seed=0, shape=SHAPE) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.3


def channel(*values: float) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


LAYERS = {  # (B, 2, 6, 7) → anything
    "linear over the last dimension": lambda: [nn.Linear(7, 3)],
    "linear without bias": lambda: [nn.Flatten(), nn.Linear(84, 3, bias=False)],
    "norm after linear": lambda: [nn.Flatten(), nn.Linear(84, 3), nn.BatchNorm1d(3)],
    "norm after linear without bias": lambda: [nn.Flatten(), nn.Linear(84, 3, bias=False), nn.BatchNorm1d(3)],
    "norm without gamma": lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False)],
    "norm alone": lambda: [nn.BatchNorm2d(2), nn.Flatten(), nn.BatchNorm1d(84), nn.ReLU()],
    "norm of sequences": lambda: [nn.Flatten(2), nn.BatchNorm1d(2)],
    "two norms": lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)],
    "stride that does not divide": lambda: [nn.Conv2d(2, 3, 3, stride=(2, 3))],
    "stride beyond the kernel": lambda: [nn.Conv2d(2, 3, 2, stride=(4, 5))],
    "rectangular": lambda: [nn.Conv2d(2, 3, (3, 2), (1, 2), (2, 0), (1, 3))],
    "dilated and strided": lambda: [nn.Conv2d(2, 3, 2, stride=2, padding=1, dilation=3)],
    "groups": lambda: [nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4, bias=False)],
    "same": lambda: [nn.Conv2d(2, 3, (2, 4), padding="same")],
    "same, dilated": lambda: [nn.Conv2d(2, 3, 2, padding="same", dilation=3)],
    "valid": lambda: [nn.Conv2d(2, 3, 3, padding="valid")],
    "reflect": lambda: [nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect")],
    "replicate": lambda: [nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="replicate"), nn.BatchNorm2d(3)],
    "circular": lambda: [nn.Conv2d(2, 4, 3, padding=2, padding_mode="circular", groups=2)],
    "circular same": lambda: [nn.Conv2d(2, 3, 2, padding="same", padding_mode="circular")],
    "average pool": lambda: [nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    "average pool, ceil": lambda: [nn.AvgPool2d((2, 3), (3, 2), ceil_mode=True)],
    "average pool, negative divisor": lambda: [nn.AvgPool2d(2, divisor_override=-3)],
    "adaptive pool": lambda: [nn.AdaptiveAvgPool2d((4, 3)), nn.AdaptiveAvgPool2d(1)],
    "sum": lambda: [Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()))],
    "difference": lambda: [Residual(nn.Conv2d(2, 2, 1), -1), Residual(nn.Sigmoid(), -1)],
    "constants": lambda: [Elementwise(channel(-2.0, 0.5), channel(1.0, -1.0)), Apply(lambda m, x: 1 - x / 3)],
    "constants of every entry": lambda: [Elementwise(torch.randn(1, *SHAPE), torch.randn(SHAPE[1:]))],
    "one channel in three": lambda: [nn.Conv2d(2, 1, 1), Elementwise(channel(1.0, -2.0, 0.5), channel(1.0, 2.0, 3.0))],
    "a shift that adds channels": lambda: [
        nn.Conv2d(2, 1, 1), Apply(lambda m, x: x + m.shift, shift=torch.randn(3, 1, 1))
    ],
    "a sum that repeats": lambda: [Apply(lambda m, x: x - F.adaptive_avg_pool2d(x, 1))],
    "the same twice": lambda: [Apply(lambda m, x: x + x)],
    "reshapes": lambda: [Apply(lambda m, x: x.view(x.size(0), 7, 2, -1).flatten(2)), nn.Flatten(), nn.Dropout()],
    "concatenation": lambda: [Joined(nn.Conv2d(2, 3, 3, padding=1)), Joined(nn.ReLU()), Joined(nn.Conv2d(10, 1, 1))],
    "concatenation of rows": lambda: [Apply(lambda m, x: torch.cat((x, F.relu(x), x), dim=-1))],
    "convolution of sequences": lambda: [nn.Flatten(2), nn.Conv1d(2, 4, 3, 2, 1, 3, groups=2), nn.BatchNorm1d(4)],
    "circular, of sequences": lambda: [nn.Flatten(2), nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular")],
    "pools of sequences": lambda: [nn.Flatten(2), nn.AvgPool1d(3, 2, 1, True), nn.AdaptiveAvgPool1d(5)],
    "gates": lambda: [nn.GELU(), nn.SiLU(), nn.GELU("tanh")],
    "activations": lambda: [nn.LeakyReLU(0.3), nn.Tanh(), nn.Sigmoid(), nn.ReLU()],
    "nothing": lambda: [nn.Identity()],
}  # fmt: skip
MAX_POOLS = {
    "plain": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, 1),
    "padded": nn.MaxPool2d(3, 2, 1),
    "dilated": nn.MaxPool2d(2, 1, 1, dilation=3),
    "ceil_mode": nn.MaxPool2d((2, 3), 4, (1, 0), ceil_mode=True),
    "rectangular": nn.MaxPool2d((1, 5), (2, 1), (0, 2)),
    "one place": nn.MaxPool2d(1, 2),
    "everything": nn.MaxPool2d((6, 7)),
    "adaptive": nn.AdaptiveMaxPool2d((4, 3)),
    "of sequences": nn.Sequential(nn.Flatten(2), nn.MaxPool1d(3, 2, 1, dilation=2)),
    "adaptive, of sequences": nn.Sequential(nn.Flatten(2), nn.AdaptiveMaxPool1d(4)),
}


def build(layers: list[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(nn.Sequential(*copy.deepcopy(layers))).double().eval()


def assert_adjoint(network: Network) -> None:
    """<A, op(z)> = <adjoint(A), z> + constant(A), for each linear operation; of several inputs, added up."""
    generator = torch.Generator().manual_seed(1)
    for operation, shape in zip(network.operations, network.shapes):
        if isinstance(operation, (Input, Nonlinear)):
            continue
        sources = [network.shapes[read] for read in operation.inputs]
        z = [torch.randn(2, *source, generator=generator, dtype=torch.float64) for source in sources]
        forms = torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)
        adjoints, constant = operation.adjoints(forms, *sources), operation.constant(forms)
        assert [adjoint.shape for adjoint in adjoints] == [(2, 3, *source) for source in sources]
        found = sum((adjoint * part.unsqueeze(1)).flatten(2).sum(-1) for adjoint, part in zip(adjoints, z)) + constant
        torch.testing.assert_close(found, (forms * operation(*z).unsqueeze(1)).flatten(2).sum(-1), **EXACT)


class TestIsTheModel:
    @given(networks(), SEEDS)
    @properties
    def test_random_compositions(self, model, seed):
        images = make_images(2, seed, (2, 6, 6))
        network = fold(model, images.shape[1:])
        error = (network(images) - model(images)).abs()
        assert (error <= 16 * rounding(model, Interval.point(images))).all()
        for value, shape in zip(network.values(images), network.shapes, strict=True):
            assert value.shape == (2, *shape)
        assert all(read < i for i, operation in enumerate(network.operations) for read in operation.inputs)
        assert_adjoint(network)

    @walk("case", LAYERS)
    @walk("count", [0, 1, 3], ids=lambda count: f"batch {count}")
    @pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of the model itself
    def test_each_layer(self, case, count):
        model, images = build(LAYERS[case]()), make_images(count)
        network = fold(model, SHAPE)
        expected = model(images) if count else model(make_images(1))[:0]
        torch.testing.assert_close(network(images), expected, **EXACT)
        assert_adjoint(network)

    @pytest.mark.parametrize("case", MAX_POOLS)
    @pytest.mark.parametrize("count", [0, 3], ids=lambda count: f"batch {count}")
    def test_max_pools_become_relus(self, case, count):
        """On whole numbers, where nothing rounds, bit for bit; with ties."""
        model = nn.Sequential(MAX_POOLS[case]).double()
        network = fold(model, SHAPE)
        images = torch.randint(-3, 3, (count, *SHAPE), generator=torch.Generator().manual_seed(0)).double()
        assert torch.equal(network(images), model(images))
        assert network.piecewise_linear
        assert all(isinstance(network.operations[i], Relu) for i in network.nonlinear)
        assert_adjoint(network)

    def test_a_pool_window_that_sees_nothing_is_refused(self):
        model = nn.Sequential(nn.MaxPool2d(2, 1, 1, dilation=3))
        with pytest.raises(UnsupportedOperation, match=r"0.*window.*accepted"):
            fold(model, torch.Size((1, 2, 2)))

    def test_with_a_batchs_statistics(self):
        model, images = small_cnn().train(), make_images(5, shape=(2, 6, 6))
        statistics = forward(model, images).statistics
        network = fold(model, images.shape[1:], statistics)
        torch.testing.assert_close(network(images), forward(model, images, statistics).logits, **EXACT)

    def test_in_training_mode_it_is_the_evaluation_network(self):
        model, images = small_cnn(), make_images(shape=(2, 6, 6))
        network = fold(model.train(), images.shape[1:])
        assert model.training
        torch.testing.assert_close(network(images), model.eval()(images), **EXACT)


class TestStructure:
    def test_operations_of_a_small_cnn(self):
        network = fold(small_cnn().eval(), torch.Size((2, 6, 6)))
        names = [type(operation).__name__ for operation in network.operations]
        assert names == ["Input", "Convolution", "Relu", "Rearrangement", "Dense", "Relu", "Dense"]
        assert [tuple(shape) for shape in network.shapes[1:]] == [(3, 3, 3), (3, 3, 3), (27,), (8,), (8,), (4,)]
        assert network.nonlinear == (2, 5) and network.piecewise_linear
        assert [operation.path for operation in network.operations[1:]] == ["0", "2", "3", "4", "6", "7"]

    def test_smooth_activations_are_not_piecewise_linear(self):
        assert not fold(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh()), torch.Size((4,))).piecewise_linear

    def test_average_pools_add_up(self):
        network = fold(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), torch.Size(SHAPE))
        assert [operation.roundings(torch.Size(SHAPE)) > 0 for operation in network.operations[1:]] == [True, False]


class TestWeights:
    def test_another_dtype_holds_the_same_numbers(self):
        """Folded in the model's own arithmetic, then converted: the network that runs is the one that is proved."""
        model = small_cnn().eval().float()
        single, double = fold(model, torch.Size((2, 6, 6))), fold(model, torch.Size((2, 6, 6)), dtype=torch.float64)
        images = make_images(shape=(2, 6, 6))
        for ours, wide in zip(single.operations, double.operations):
            for name in ("weight", "bias"):
                if hasattr(ours, name):
                    assert getattr(ours, name).dtype == torch.float32
                    assert torch.equal(getattr(ours, name).double(), getattr(wide, name))
        assert single(images.float()).dtype == torch.float32 and double(images).dtype == torch.float64
        torch.testing.assert_close(single(images.float()).double(), double(images), rtol=1e-5, atol=1e-5)

    @walk(
        ("model", "path"),
        [
            (nn.Sequential(nn.Flatten(), nn.Sequential(nn.ReLU(), nn.Linear(84, 3))), "1.1"),
            (nn.Sequential(nn.ReLU(), nn.Conv2d(2, 3, 3, padding="same")), "1"),
            (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), "0"),
            (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2)), "1"),
            (nn.Sequential(nn.ReLU(), Elementwise(channel(1.0, 1.0), channel(1.0, 1.0))), "mul|add"),
        ],
        ids=["linear", "convolution", "norm after it", "norm", "constant"],
    )
    @walk("value", [math.nan, math.inf, -math.inf])
    @walk("bias", [False, True], ids=["weight", "bias"])
    def test_a_weight_that_is_not_finite_is_named(self, model, path, value, bias):
        model = copy.deepcopy(model).eval()
        parameters = list(model.parameters())
        with torch.no_grad():
            parameters[-1 if bias else 0].flatten()[-1] = value
        with pytest.raises(UnsupportedOperation, match=rf"^'?({path}).*not finite.*accepted"):
            fold(model, torch.Size(SHAPE))

    @pytest.mark.parametrize("case", ["norm after linear", "same", "replicate", "constants", "sum"])
    def test_gradients_reach_them(self, case):
        """The model's own gradients, in evaluation mode."""
        model = build(LAYERS[case]())
        images = make_images()
        expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(fold(model, SHAPE)(images).square().sum(), list(model.parameters()))
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    @walk("case", LAYERS)
    def test_gradients_through_adjoints(self, case):
        network = fold(build(LAYERS[case]()), SHAPE)
        for operation, shape in zip(network.operations, network.shapes):
            if isinstance(operation, (Input, Nonlinear)) or len(operation.inputs) > 1:
                continue
            source = network.shapes[operation.inputs[0]]
            forms = torch.randn(1, 1, *shape, dtype=torch.float64, requires_grad=True)
            z = torch.randn(1, 1, *source, dtype=torch.float64)
            total = (operation.adjoints(forms, source)[0] * z).sum() + operation.constant(forms)
            (found,) = torch.autograd.grad(total.sum(), forms)
            torch.testing.assert_close(found, operation(z[0])[None], **EXACT)
