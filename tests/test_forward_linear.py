"""Forward linear bounds: no number of the network leaves them, they are never looser than intervals of the same
operations, and exact where the network is affine."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Apply, Elementwise, Residual, networks, points_inside, rounding
from planted import KINDS, planted_pair
from test_folded import LAYERS, MAX_POOLS, SHAPE, build
from torch import Tensor, nn

from certtrain.bounds import Bounds, Box, LinfBall, Network, Region
from certtrain.bounds.crown import crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.forward_linear import forward_bounds

CASES = [*LAYERS, *(f"max pool, {name}" for name in MAX_POOLS)]
WIDTHS = st.sampled_from([0.0, 1e-3, 0.1, 2.0])
properties = settings(
    deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def network_around(case: str) -> nn.Module:
    """A layer between two others, so that lines of several slopes reach it, and bounds of what it makes are kept."""
    layers = LAYERS[case]() if case in LAYERS else [MAX_POOLS[case.removeprefix("max pool, ")]]
    last = Apply(lambda m, x: x.flatten(1))
    return build([nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), *layers, nn.ReLU(), last, nn.Tanh()])


def box_of(count: int, shape, seed: int = 0, width: float = 0.5, share: float = 0.2, dtype=torch.float64) -> Box:
    """In any units; each box varies in its own few inputs, about ``share`` of them."""
    draw = torch.Generator().manual_seed(seed)
    lower = torch.randn(count, *shape, generator=draw, dtype=dtype)
    wide = torch.rand(count, *shape, generator=draw) < share
    return Box(lower, lower + width * torch.rand(count, *shape, generator=draw, dtype=dtype) * wide)


def points_of(region: Region, count: int = 10, seed: int = 1) -> list[Tensor]:
    """Random points, and as many corners."""
    draw, hull = torch.Generator().manual_seed(seed), region.hull
    shares = [torch.rand(hull.center.shape, generator=draw, dtype=hull.center.dtype) for _ in range(count)]
    shares += [share.round() for share in shares]
    return [region.nearest(hull.lower + share * (hull.upper - hull.lower)) for share in shares]


def assert_encloses(network: Network, found: dict[int, Bounds], points: list[Tensor], slack: float) -> None:
    assert set(found) == set(network.nonlinear)
    for point in points:
        values = network.values(point)
        for place, bounds in found.items():
            value = values[network.operations[place].inputs[0]]
            assert bounds.lower.shape == bounds.upper.shape == value.shape
            assert (bounds.lower - slack <= value).all() and (value <= bounds.upper + slack).all()


class TestSound:
    @given(networks(), WIDTHS, st.sampled_from([0.03, 0.3, 1.0]), st.integers(0, 1000))
    @properties
    def test_on_random_compositions(self, model, width, share, seed):
        region = box_of(2, (2, 6, 6), seed, width, share)
        network = fold(model, torch.Size((2, 6, 6)))
        slack = 1e-10 + 100 * float(rounding(model, region.hull).max())
        found, intervals = forward_bounds(network, region), interval_bounds(network, region)
        assert_encloses(network, found, [region.nearest(point) for point in points_inside(model, region.hull)], slack)
        for place, bounds in intervals.items():
            assert (found[place].lower <= found[place].upper).all()
            assert (found[place].lower >= bounds.lower - slack).all()
            assert (found[place].upper <= bounds.upper + slack).all()

    @pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of the model itself
    @pytest.mark.parametrize("case", CASES)
    def test_each_layer_in_each_precision_for_each_batch(self, case):
        model = network_around(case)
        for dtype, slack in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            network = fold(model.to(dtype), torch.Size(SHAPE))
            for count in (0, 1, 3):
                region = box_of(count, SHAPE, seed=count, dtype=dtype)
                found = forward_bounds(network, region)
                assert all(bounds.lower.dtype == dtype and len(bounds.lower) == count for bounds in found.values())
                assert_encloses(network, found, points_of(region, 5), slack)

    @pytest.mark.parametrize("kind", KINDS)
    def test_planted_networks(self, kind):
        for seed in range(5):
            for case in planted_pair(seed, kind):
                region = LinfBall(case.epsilon).region(case.image[None])
                network = fold(case.model, case.image.shape)
                tips = [] if case.counterexample is None else [case.counterexample[None]]
                with torch.no_grad():
                    assert_encloses(network, forward_bounds(network, region), [*points_of(region), *tips], 1e-3)

    def test_an_average_that_turns_signs_inside_of_a_difference(self):
        """Lines that are exchanged once too often, or not at all, cross the values."""
        layers = [nn.Conv2d(2, 2, 1), nn.Tanh(), nn.AvgPool2d(2, divisor_override=-3),
                  Residual(nn.Sequential(nn.AvgPool2d(1, divisor_override=-1), nn.Sigmoid()), -1),
                  Elementwise(torch.tensor([-2.0, 0.5]).reshape(2, 1, 1), torch.ones(2, 1, 1)), nn.Flatten(),
                  nn.ReLU()]  # fmt: skip
        model = build(layers)
        region = box_of(3, SHAPE, width=2.0, share=0.5)
        network = fold(model, torch.Size(SHAPE))
        points = [region.nearest(point) for point in points_inside(model, region.hull, 20)]
        assert_encloses(network, forward_bounds(network, region), points, 1e-9)


class TestExact:
    def test_affine_networks(self):
        """Every linear operation: each end is a corner's, in closed form; intervals are far wider."""
        layers = [
            nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, 2, 1, padding_mode="reflect"), nn.BatchNorm2d(3),
            Residual(nn.Conv2d(3, 3, 3, padding="same"), -1), nn.AvgPool2d(2, 1, divisor_override=-3),
            LAYERS["a sum that repeats"]()[0], nn.Flatten(), nn.Linear(18, 5), Residual(nn.Linear(5, 1)),
        ]  # fmt: skip
        affine = build(layers)
        model = nn.Sequential(affine, nn.ReLU()).eval()
        for seed, share in ((0, 0.05), (1, 1.0), (2, 0.0)):
            region = box_of(3, SHAPE, seed, share=share)
            network = fold(model, torch.Size(SHAPE))
            (found,) = forward_bounds(network, region).values()
            zero = torch.zeros(1, *SHAPE, dtype=torch.float64)
            jacobian = torch.func.jacrev(lambda x: affine(x)[0])(zero).squeeze(1).flatten(1).detach()
            center = affine(region.hull.center).detach()
            reach = region.hull.radius.flatten(1) @ jacobian.abs().T
            torch.testing.assert_close(found.lower, center - reach, **CLOSE)
            torch.testing.assert_close(found.upper, center + reach, **CLOSE)
            (wider,) = interval_bounds(network, region).values()
            assert not share or (wider.upper - wider.lower - 2 * reach > 1e-3).all()

    @pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh()])
    def test_a_point_is_its_own_bound(self, activation):
        torch.manual_seed(0)
        hidden = [layer for _ in range(3) for layer in (nn.Linear(20, 20), activation)]
        model = nn.Sequential(nn.Flatten(), nn.Linear(84, 20), activation, *hidden, nn.Linear(20, 4)).double()
        region = box_of(3, SHAPE, width=0.0)
        network = fold(model, torch.Size(SHAPE))
        values = network.values(region.images)
        for place, found in forward_bounds(network, region).items():
            value = values[network.operations[place].inputs[0]]
            torch.testing.assert_close(found.lower, value)
            torch.testing.assert_close(found.upper, value)


class TestGiven:
    @pytest.mark.parametrize("case", ["sum", "average pool, negative divisor", "activations", "max pool, overlapping"])
    def test_given_bounds_are_intersected(self, case):
        network = fold(network_around(case), torch.Size(SHAPE))
        region = box_of(2, SHAPE, width=1.0)
        alone, given_ = forward_bounds(network, region), crown_bounds(network, region)
        first = network.nonlinear[0]
        tight = given_ | {first: Bounds(*(torch.stack([network.values(p)[network.operations[first].inputs[0]]
                                                      for p in points_of(region, 3)]).aminmax(dim=0)))}  # fmt: skip
        for better in (given_, tight):
            found = forward_bounds(network, region, better)
            for place, bounds in found.items():
                assert (bounds.lower >= better[place].lower).all()
                assert (bounds.upper <= better[place].upper + 1e-12).all()  # ends that cross by a rounding meet
        assert (found[first].lower > alone[first].lower).any()
        assert_encloses(network, forward_bounds(network, region, given_), points_of(region), 1e-9)

    def test_of_some_operations_alone(self):
        network = fold(network_around("sum"), torch.Size(SHAPE))
        region = box_of(2, SHAPE, width=1.0)
        last = network.nonlinear[-1]
        narrow = {last: crown_bounds(network, region)[last]}
        found, alone = forward_bounds(network, region, narrow), forward_bounds(network, region)
        assert all(torch.equal(found[p].lower, alone[p].lower) for p in network.nonlinear if p != last)
        assert (found[last].lower >= narrow[last].lower).all() and not torch.equal(found[last].lower, alone[last].lower)


class TestBatches:
    @given(networks(), st.integers(0, 1000))
    @settings(properties, max_examples=10)
    def test_one_box_at_a_time(self, model, seed):
        region = box_of(3, (2, 6, 6), seed)
        network = fold(model, torch.Size((2, 6, 6)))
        slack = 1e-10 + 100 * float(rounding(model, region.hull).max())
        together = forward_bounds(network, region)
        for number in range(3):
            for place, alone in forward_bounds(network, region.take(torch.tensor([number]))).items():
                assert ((together[place].lower[number] - alone.lower[0]).abs() <= slack).all()
                assert ((together[place].upper[number] - alone.upper[0]).abs() <= slack).all()

    def test_any_region_by_its_hull(self):
        images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ball, network = LinfBall(0.1), fold(network_around("sum"), torch.Size(SHAPE))
        around, box = forward_bounds(network, ball.region(images)), forward_bounds(network, Box(*ball.ends(images)))
        for place, found in around.items():
            assert torch.equal(found.lower, box[place].lower) and torch.equal(found.upper, box[place].upper)
