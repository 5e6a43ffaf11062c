"""Optimised linear bounds: never below their start, sound with and without constraints, better where they can be."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import networks, specification
from test_crown import CLOSE, SEEDS, inside, make_region, properties, random_forms, slack_of, values_of
from torch import Tensor, nn

from certtrain.bounds import L2Ball, LinfBall, Network, Region
from certtrain.bounds.crown import bound_forms, crown_bounds
from certtrain.bounds.folding import fold
from certtrain.verifiers.neurons import Neurons
from certtrain.verifiers.optimise import Subproblems, maximise, starting_slopes


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)]
    return nn.Sequential(nn.Flatten(), *layers).double()


def frozen(model: nn.Module, region: Region) -> Network:
    """Its weights are constants, as for every verifier."""
    with torch.no_grad():
        return fold(model.requires_grad_(False), region.images.shape[1:])


def kinked(network: Network) -> bool:
    """Whether there is a slope to choose."""
    return any(network.nonlinear_at(i).piecewise_linear for i in network.nonlinear)


def subproblems(network: Network, region: Region, forms: Tensor, bounds) -> Subproblems:
    neurons = Neurons.of(network)
    lower, upper = (neurons.together({p: getattr(b, end) for p, b in bounds.items()}) for end in ("lower", "upper"))
    return Subproblems(region, forms, torch.zeros(forms.shape[:2], dtype=forms.dtype), lower, upper)


class TestOptimised:
    @given(networks(), st.sampled_from([LinfBall(0.05), LinfBall(0.5), L2Ball(0.5)]), SEEDS)
    @settings(properties, max_examples=40)
    def test_never_below_the_start_and_sound(self, model, ball, seed):
        region = make_region(ball, seed=seed)
        network, slack = frozen(model, region), slack_of(model, region)
        if not kinked(network):
            return
        forms, bounds = random_forms(network), crown_bounds(network, region)
        start = bound_forms(network, region, forms, bounds)
        sub = subproblems(network, region, forms, bounds)
        slopes = starting_slopes(sub.lower, sub.upper, forms.shape[1])
        slack = slack * float(1 + forms.abs().sum())
        plain = maximise(network, sub, slopes, steps=0)
        assert (plain.best >= start - slack).all() and torch.equal(plain.alphas, slopes)
        found = maximise(network, sub, slopes, steps=6, rate=0.3)
        assert (found.best >= plain.best).all()
        assert ((found.alphas >= 0) & (found.alphas <= 1)).all()
        for point in inside(model, region):
            assert (found.best <= values_of(forms, network(point)) + slack).all()

    def test_without_slopes_to_choose(self):
        model, region = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Softmax(1)).double(), make_region()
        network = frozen(model, region)
        forms, bounds = random_forms(network), crown_bounds(network, region)
        sub = subproblems(network, region, forms, bounds)
        found = maximise(network, sub, starting_slopes(sub.lower, sub.upper, 3), steps=3)
        torch.testing.assert_close(found.best, bound_forms(network, region, forms, bounds), **CLOSE)

    def test_better_where_slopes_matter(self):
        model, region = mlp(), make_region(LinfBall(0.2))
        network = frozen(model, region)
        forms = specification(torch.tensor([0, 1]), 4)
        bounds = crown_bounds(network, region)
        sub = subproblems(network, region, forms, bounds)
        found = maximise(network, sub, starting_slopes(sub.lower, sub.upper, 3), steps=20)
        assert (found.best > bound_forms(network, region, forms, bounds) + 1e-3).all()

    @given(networks(), SEEDS)
    @settings(properties, max_examples=40)
    def test_sound_under_constraints(self, model, seed):
        """Signs taken from a point: that point, and others that agree, stay above the bound."""
        region = make_region(LinfBall(0.3), seed=seed)
        network = frozen(model, region)
        if not kinked(network):
            return
        slack, neurons, generator = slack_of(model, region), Neurons.of(network), torch.Generator().manual_seed(seed)

        def entering(point: Tensor) -> Tensor:
            values = network.values(point)
            return neurons.together({p: values[network.operations[p].inputs[0]] for p in network.nonlinear})

        chosen = region.hull.lower + 2 * region.hull.radius * torch.rand(
            region.images.shape, generator=generator, dtype=torch.float64
        )
        forms, bounds = random_forms(network), crown_bounds(network, region)
        sub = subproblems(network, region, forms, bounds)
        asked = torch.rand(sub.lower.shape, generator=generator) < 0.3
        signs = torch.where(asked & (sub.lower < 0) & (sub.upper > 0), entering(chosen).sign(), 0).to(torch.int8)
        lower, upper = torch.where(signs > 0, 0, sub.lower), torch.where(signs < 0, 0, sub.upper)
        split = Subproblems(region, forms, sub.offsets, lower, upper, signs)
        betas = torch.rand(2, 3, lower.shape[1], generator=generator, dtype=torch.float64)
        found = maximise(network, split, starting_slopes(lower, upper, 3), betas, steps=4)
        assert found.betas is not None and (found.betas >= 0).all()
        met = 0
        for point in [chosen, *inside(model, region)]:
            agrees = (entering(point) * signs >= 0).all(1)
            met += int(agrees.sum())
            value = values_of(forms, network(point)) + slack * (1 + forms.abs().sum())
            assert (found.best <= value)[agrees].all()
        assert met >= 2

    def test_constraints_help(self):
        """With every sign fixed one linear piece is left; without, the bound is looser."""
        model, region = mlp(), make_region(LinfBall(0.2))
        network = frozen(model, region)
        neurons, values = Neurons.of(network), network.values(region.images)
        forms = specification(torch.tensor([0, 1]), 4)
        sub = subproblems(network, region, forms, crown_bounds(network, region))
        entering = neurons.together({p: values[network.operations[p].inputs[0]] for p in network.nonlinear})
        signs = torch.where((sub.lower < 0) & (sub.upper > 0), entering.sign(), 0).to(torch.int8)
        lower, upper = torch.where(signs > 0, 0, sub.lower), torch.where(signs < 0, 0, sub.upper)
        split = Subproblems(region, forms, sub.offsets, lower, upper, signs)
        free = maximise(network, sub, starting_slopes(sub.lower, sub.upper, 3), steps=20).best
        without = maximise(network, split, starting_slopes(lower, upper, 3), steps=0).best
        fixed = maximise(network, split, starting_slopes(lower, upper, 3), steps=40).best
        assert (fixed > without + 1e-3).all() and (fixed > free + 1e-3).all()
        assert (fixed <= values_of(forms, values[-1]) + 1e-9).all()
