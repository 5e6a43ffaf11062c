"""Linear functions of linear functions: which intervals are exact, and linear bounds where they are not."""

import torch
from test_crown import make_region
from torch import Tensor, nn
from walking import walk

from certtrain.bounds import LinfBall
from certtrain.bounds.crown import crown_bounds, interval_bounds
from certtrain.bounds.folding import fold


class Chain(nn.Module):
    """Linear functions of an image of shape (2, 6, 6), and a ReLU."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.relu, self.flatten = function, nn.ReLU(), nn.Flatten()
        self.convolution, self.dense, self.square = nn.Conv2d(2, 3, 3), nn.Linear(72, 5), nn.Linear(5, 5)
        self.pool, self.last = nn.AvgPool2d(2), nn.LazyLinear(3)
        self.double()(torch.rand(1, 2, 6, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.flatten(self.relu(self.function(self, x))))


CHAINS = {
    "one convolution": (lambda m, x: m.convolution(x), True),
    "scaled before and behind": (lambda m, x: 2.0 * m.convolution((x - 0.5) / 0.3) + 1.0, True),
    "turned around": (lambda m, x: m.convolution(x.transpose(2, 3)).transpose(1, 2), True),
    "a part of a dense layer": (lambda m, x: m.dense(m.flatten(x))[:, 1:4], True),
    "nothing": (lambda m, x: x, True),
    "two dense layers": (lambda m, x: m.square(m.dense(m.flatten(x))), False),
    "a pool before": (lambda m, x: m.dense(torch.cat([m.flatten(m.pool(x)).repeat(1, 4)], 1)), False),
    "entries twice": (lambda m, x: m.convolution(x[:, :1].repeat(1, 2, 1, 1)), False),
    "the image added": (lambda m, x: x - m.pool(x).repeat(1, 1, 2, 2), False),
}  # fmt: skip


@walk("name", CHAINS)
def test_bounds_are_the_exact_ranges(name):
    function, exact = CHAINS[name]
    region = make_region(LinfBall(0.1))
    with torch.no_grad():
        network = fold(Chain(function).eval().requires_grad_(False), region.images.shape[1:])
        (place,) = network.nonlinear
        read = network.operations[place].inputs[0]
        assert network.exact_intervals[read] == exact and not network.exact_intervals[place]
        bounds, boxes = crown_bounds(network, region)[place], interval_bounds(network, region)[place]
        shape, count = network.shapes[read], network.shapes[read].numel()
        zero, center = network.values(torch.zeros_like(region.images))[read], network.values(region.hull.center)[read]
        units = torch.eye(region.images[0].numel(), dtype=torch.float64).reshape(-1, *region.images.shape[1:])
        slopes = (network.values(units)[read] - zero[:1]).reshape(-1, count)
        reach = (region.hull.radius.flatten(1) @ slopes.abs()).reshape(-1, *shape)
        unstable = (boxes.lower < 0) & (boxes.upper > 0)
        for end, wanted in ((bounds.lower, center - reach), (bounds.upper, center + reach)):
            torch.testing.assert_close(end[unstable], wanted[unstable], rtol=0, atol=1e-9)
        if exact:
            assert torch.equal(bounds.lower, boxes.lower) and torch.equal(bounds.upper, boxes.upper)
        else:
            assert (boxes.upper - boxes.lower > 2 * reach + 1e-6).any()
