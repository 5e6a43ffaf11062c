"""Linear bounds: sound, at least as tight as intervals, and exact where they must be."""

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Apply, Joined, Residual, networks, points_inside, rounding, small_cnn, specification
from test_folded import LAYERS, MAX_POOLS, SHAPE, build
from torch import Tensor, nn
from walking import pairs, walk

from certtrain.bounds import Interval, L2Ball, LinfBall, Network, Region, compute_bounds, compute_rows, crown
from certtrain.bounds.crown import backward, bound_forms, crown_bounds, interval_bounds, relax_all
from certtrain.bounds.folding import fold
from certtrain.bounds.windows import Windows

SEEDS = st.integers(0, 1000)
BALLS = st.sampled_from([LinfBall(0.0), LinfBall(1e-3), LinfBall(0.05), LinfBall(0.5), L2Ball(0.05), L2Ball(1.0)])
properties = settings(
    deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def make_region(ball=LinfBall(0.05), count=2, seed=0, shape=(2, 6, 6)) -> Region:  # noqa: B008
    generator = torch.Generator().manual_seed(seed)
    return ball.region(torch.rand(count, *shape, generator=generator, dtype=torch.float64))


def random_forms(network: Network, count=2, rows=3, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, *network.shapes[-1], generator=generator, dtype=torch.float64)


def slack_of(model: nn.Module, region: Region) -> float:
    """Rounding of a bound: max pools and lines have a few more summands than intervals, of the same size."""
    return 1e-10 + 100 * float(rounding(model, region.hull).max())


def inside(model: nn.Module, region: Region, count=3) -> list[Tensor]:
    return [region.ball.project(region.images, point) for point in points_inside(model, region.hull, count)]


def values_of(forms: Tensor, logits: Tensor) -> Tensor:
    return (forms * logits.unsqueeze(1)).flatten(2).sum(-1)


def assert_sound(model: nn.Module, network: Network, region: Region, slack: float) -> None:
    """Neurons' inputs and linear forms of the logits, at points of the region; CROWN within the intervals."""
    intervals, linear = interval_bounds(network, region), crown_bounds(network, region)
    forms = random_forms(network, len(region.images))
    lower = [bound_forms(network, region, forms, bounds) for bounds in (intervals, linear)]
    assert set(intervals) == set(linear) == set(network.nonlinear)
    for place, found in linear.items():
        assert (found.lower <= found.upper).all()
        assert (found.lower >= intervals[place].lower - slack).all()
        assert (found.upper <= intervals[place].upper + slack).all()
    for point in inside(model, region):
        values = network.values(point)
        for place, found in linear.items():
            (read,) = network.operations[place].inputs
            assert (found.lower - slack <= values[read]).all() and (values[read] <= found.upper + slack).all()
        for bound in lower:
            assert (bound <= values_of(forms, values[-1]) + slack * forms.abs().flatten(2).sum(-1)).all()


class TestSound:
    @given(networks(), BALLS, SEEDS)
    @properties
    def test_on_random_compositions(self, model, ball, seed):
        region = make_region(ball, 4, seed)
        assert_sound(model, fold(model, region.images.shape[1:]), region, slack_of(model, region))

    @pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of the model itself
    @pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.5)], ids=["linf", "l2"])
    @pytest.mark.parametrize("case", [*LAYERS, *(f"max pool, {name}" for name in MAX_POOLS)])
    def test_each_layer(self, case, ball):
        """Between two convolutions with ReLUs, so that its adjoint carries forms and its intervals count."""
        layers = LAYERS[case]() if case in LAYERS else [MAX_POOLS[case.removeprefix("max pool, ")]]
        first, last = nn.Conv2d(2, 2, 3, padding=1), Apply(lambda m, x: x.flatten(1))
        model = build([first, nn.ReLU(), *layers, nn.ReLU(), last])
        region = make_region(ball, shape=SHAPE)
        assert_sound(model, fold(model, SHAPE), region, 1e-9)

    def test_float32_up_to_its_rounding(self):
        model, region = small_cnn().eval(), make_region()
        single = region.ball.region(region.images.float())
        wide, narrow = fold(model, (2, 6, 6)), fold(model, (2, 6, 6), dtype=torch.float32)  # type: ignore[arg-type]
        forms = random_forms(wide)
        found, expected = crown_bounds(narrow, single), crown_bounds(wide, region)
        for place, bounds in expected.items():
            torch.testing.assert_close(found[place].lower.double(), bounds.lower, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[place].upper.double(), bounds.upper, rtol=1e-5, atol=1e-5)
        lower = bound_forms(narrow, single, forms.float(), found)
        torch.testing.assert_close(lower.double(), bound_forms(wide, region, forms, expected), rtol=1e-5, atol=1e-5)


class TestExact:
    @pytest.mark.parametrize("ball", [LinfBall(0.2), L2Ball(0.7)], ids=["linf", "l2"])
    def test_affine_networks(self, ball):
        """Every linear operation: the form's minimum over the set, in closed form."""
        layers = [
            nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, 2, 1, padding_mode="reflect"), nn.BatchNorm2d(3),
            Residual(nn.Conv2d(3, 3, 3, padding="same"), -1), nn.AvgPool2d(2, 1), LAYERS["a sum that repeats"]()[0],
            nn.Flatten(), nn.Linear(18, 5), Residual(nn.Linear(5, 1)), nn.LeakyReLU(1.0),
        ]  # fmt: skip
        model, region = build(layers), make_region(ball, shape=SHAPE)
        network = fold(model, SHAPE)
        zero = region.images[:1] * 0
        jacobian = torch.func.jacrev(lambda x: model(x)[0])(zero).squeeze(1)
        forms = random_forms(network)
        whole = torch.einsum("brk,kchw->brchw", forms, jacobian)
        expected = ball.concretise(whole, region.images) + values_of(forms, model(zero))
        torch.testing.assert_close(bound_forms(network, region, forms, crown_bounds(network, region)), expected)

    @pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1)])
    @pytest.mark.parametrize("kind", ["mlp", "cnn"])
    def test_without_unstable_neurons(self, kind, activation):
        """One linear piece: a corner of the box attains the minimum."""
        torch.manual_seed(0)
        start = [nn.Flatten(), nn.Linear(4, 6)] if kind == "mlp" else [nn.Conv2d(1, 2, 2, padding=1), nn.Flatten()]
        model = nn.Sequential(*start, activation, nn.Linear(6 if kind == "mlp" else 18, 5), activation, nn.Linear(5, 3))
        model = model.double().eval()
        with torch.no_grad():
            for layer in model:
                if hasattr(layer, "bias"):
                    layer.bias += 30 * (-1.0) ** torch.arange(len(layer.bias))
        region = make_region(LinfBall(0.3), shape=(1, 2, 2))
        network = fold(model, region.images.shape[1:])
        bounds = crown_bounds(network, region)
        assert all(((b.lower >= 0) | (b.upper <= 0)).all() for b in bounds.values())
        forms, hull = random_forms(network), region.hull
        corners = [
            torch.where(torch.tensor(signs).reshape(1, 2, 2), hull.upper, hull.lower)
            for signs in itertools.product([False, True], repeat=4)
        ]
        expected = torch.stack([values_of(forms, model(corner)) for corner in corners]).amin(0)
        torch.testing.assert_close(bound_forms(network, region, forms, bounds), expected)

    @pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.GELU("tanh"), nn.SiLU()])
    def test_a_point_gives_the_output(self, activation):
        torch.manual_seed(0)
        hidden = [layer for _ in range(3) for layer in (nn.Linear(50, 50), activation)]
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 50), activation, *hidden, nn.Linear(50, 4)).double()
        region = make_region(LinfBall(0.0), 20)
        network = fold(model, region.images.shape[1:])
        forms = random_forms(network, 20)
        bounds = crown_bounds(network, region)
        assert all((found.lower <= found.upper).all() for found in bounds.values())
        found = bound_forms(network, region, forms, bounds)
        torch.testing.assert_close(found, values_of(forms, model(region.images)), **CLOSE)

    def test_intervals_are_those_of_ibp(self):
        """The operations' own rules, against the fused ones: the last layer's input, through its rows."""
        model, region = small_cnn().eval(), make_region()
        network = fold(model, region.images.shape[1:])
        last = nn.Sequential(*list(copy.deepcopy(model))[:6])
        found = interval_bounds(network, region)[network.nonlinear[-1]]
        eye = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
        torch.testing.assert_close(found.lower, compute_rows(last, region, eye), **CLOSE)
        torch.testing.assert_close(found.upper, -compute_rows(last, region, -eye), **CLOSE)

    @pytest.mark.parametrize("case", MAX_POOLS)
    def test_intervals_of_a_max_pool_are_the_largest_ends(self, case):
        """b + relu(a - b) alone would forget that both b are one."""
        pool = build([nn.Conv2d(2, 2, 3, padding=1), MAX_POOLS[case]])
        model, region = nn.Sequential(*pool, nn.ReLU()).double().eval(), make_region(shape=SHAPE)
        network = fold(model, torch.Size(SHAPE))
        found, expected = interval_bounds(network, region)[network.nonlinear[-1]], compute_bounds(pool, region)
        torch.testing.assert_close(found.lower, expected.lower, **CLOSE)
        torch.testing.assert_close(found.upper, expected.upper, **CLOSE)


class TestBatches:
    @given(networks(), st.sampled_from([LinfBall(0.05), L2Ball(0.3)]), SEEDS)
    @settings(properties, max_examples=15)
    def test_one_image_at_a_time(self, model, ball, seed):
        region = make_region(ball, 3, seed)
        network, slack = fold(model, region.images.shape[1:]), slack_of(model, region)
        forms = random_forms(network, 3)
        together = crown_bounds(network, region)
        lower = bound_forms(network, region, forms, together)
        for i in range(3):
            alone = crown_bounds(network, ball.region(region.images[i : i + 1]))
            for place, bounds in together.items():
                assert ((bounds.lower[i] - alone[place].lower[0]).abs() <= slack).all()
                assert ((bounds.upper[i] - alone[place].upper[0]).abs() <= slack).all()
            one = bound_forms(network, ball.region(region.images[i : i + 1]), forms[i : i + 1], alone)
            assert ((lower[i] - one[0]).abs() <= slack * forms.abs().sum()).all()

    @given(networks(), st.sampled_from([LinfBall(0.05), L2Ball(0.3)]), SEEDS)
    @settings(properties, max_examples=10)
    def test_in_little_memory(self, model, ball, seed):
        region = make_region(ball, seed=seed)
        network, slack = fold(model, region.images.shape[1:]), slack_of(model, region)
        expected = crown_bounds(network, region)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(crown, "MEMORY", 1)
            assert crown.rows_at_a_time(network, 2, region.images) == 1
            found = crown_bounds(network, region)
        for place, bounds in expected.items():
            assert ((bounds.lower - found[place].lower).abs() <= slack).all()
            assert ((bounds.upper - found[place].upper).abs() <= slack).all()

    @walk("ball", [LinfBall(0.1), L2Ball(0.1)], ids=["linf", "l2"])
    @walk("case", [*LAYERS, *(f"max pool, {name}" for name in MAX_POOLS)])
    def test_of_no_images(self, case, ball):
        layers = LAYERS[case]() if case in LAYERS else [MAX_POOLS[case.removeprefix("max pool, ")]]
        model = build([*layers, nn.ReLU(), Apply(lambda m, x: x.flatten(1)), nn.ReLU()])
        region = make_region(ball, 0, shape=SHAPE)
        network = fold(model, SHAPE)
        bounds = crown_bounds(network, region)
        assert bound_forms(network, region, random_forms(network, 0), bounds).shape == (0, 3)
        assert crown.rows_at_a_time(network, 0, region.images) >= 1


@pytest.mark.parametrize("dim", [1, 2], ids=["channels", "rows"])
def test_windows_behind_a_concatenation(dim, monkeypatch):
    """The same bounds as whole passes: windows go through channels side by side; rows are no local operation."""
    first = Joined(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.GELU()), dim)
    second = Joined(nn.Sequential(nn.Conv2d(4 if dim == 1 else 2, 3 if dim == 1 else 2, 3, padding=1), nn.ReLU()), dim)
    model = build([nn.Conv2d(2, 2, 3, padding=1), first, second, nn.Conv2d(7 if dim == 1 else 2, 2, 3), nn.ReLU()])
    model = model.append(nn.Flatten()).requires_grad_(False)
    network, region = fold(model, torch.Size((2, 14, 12))), make_region(shape=(2, 14, 12))
    assert (Windows.behind(network, network.nonlinear[-1] - 1) is not None) == (dim == 1)
    assert_sound(model, network, region, 1e-9)
    found = crown_bounds(network, region)
    monkeypatch.setattr(Windows, "behind", lambda *_: None)
    for place, whole in crown_bounds(network, region).items():
        torch.testing.assert_close(found[place].lower, whole.lower, **CLOSE)
        torch.testing.assert_close(found[place].upper, whole.upper, **CLOSE)


class TestGradients:
    @walk(
        "activation, ball, bounding",
        pairs(
            [nn.ReLU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh(), nn.SiLU()],
            [LinfBall(0.1), L2Ball(0.4)], [interval_bounds, crown_bounds],
        ),
    )  # fmt: skip
    def test_by_the_weights(self, activation, ball, bounding):
        """CROWN-IBP as a loss, and full CROWN: against finite differences through the whole bound."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), activation, nn.Flatten(), nn.Linear(8, 3), activation,
            nn.Linear(3, 3),
        ).double().eval()  # fmt: skip
        region, forms = make_region(ball, shape=(1, 3, 3)), specification(torch.tensor([0, 2]), 3)

        def bound(m, images):
            network = fold(m.model, images.shape[1:])
            return bound_forms(network, ball.region(images), forms, bounding(network, ball.region(images)))

        wrapped = Apply(bound, model=model)
        names = [name for name, _ in wrapped.named_parameters()]

        def by_weights(*parameters):
            return torch.func.functional_call(wrapped, dict(zip(names, parameters)), (region.images,))

        parameters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
        assert torch.autograd.gradcheck(by_weights, parameters, fast_mode=True)

    def test_a_form_of_any_operation(self):
        """Positions inside the network, with no non-linear operation on the way, and the input itself."""
        model, region = small_cnn().eval(), make_region()
        network = fold(model, region.images.shape[1:])
        for position, shape in enumerate(network.shapes[:2]):
            forms = torch.randn(2, 3, *shape, dtype=torch.float64)
            bound = backward(network, position, forms, relax_all(network, {}))
            value = values_of(forms, network.values(region.images)[position])
            torch.testing.assert_close(values_of(bound.forms, region.images) + bound.constants, value, **CLOSE)
        box = Interval.box(region.images, 0.05)
        forms = torch.randn(2, 3, 2, 6, 6, dtype=torch.float64)
        expected = values_of(forms, box.center) - (forms.abs() * box.radius.unsqueeze(1)).flatten(2).sum(-1)
        torch.testing.assert_close(bound_forms(network, region, forms, {}, 0), expected, **CLOSE)
