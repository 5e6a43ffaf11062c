"""SABR, TAPS, STAPS and CROWN-IBP from their formulas alone: dense matrices, lower and upper ends, loops.

The same step and the same starts; the loss and its gradient agree in float64. Against the public code of two other
projects they agreed too when this was written (CTBench, and auto_LiRPA's fused loss).
"""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import gradient, make_batch, make_model, make_step
from torch import Tensor, nn

from certtrain.attacks import Pgd
from certtrain.losses import CrownIbp, Ibp, Sabr, Staps, Taps

Dense = tuple[Tensor, Tensor]


def dense_layers(model, images: Tensor) -> list[Dense]:
    """(weight, bias) of the three affine layers, the clean batch's statistics merged in with their gradients."""
    convolution, first, _, _, linear, second, _, last = model
    size = images[0].numel()
    columns = F.conv2d(torch.eye(size, dtype=images.dtype).reshape(size, *images.shape[1:]), convolution.weight,
                       stride=2, padding=1)  # fmt: skip
    places = columns[0, 0].numel()
    weight, bias = columns.flatten(1).T, convolution.bias.repeat_interleave(places)
    found = images.flatten(1) @ weight.T + bias
    by_channel = found.reshape(len(images), -1, places)
    mean, variance = (v.repeat_interleave(places) for v in moments(by_channel, (0, 2)))
    scale = first.weight.repeat_interleave(places) / (variance + first.eps).sqrt()
    layers = [(scale[:, None] * weight, scale * (bias - mean) + first.bias.repeat_interleave(places))]
    inner = F.relu(images.flatten(1) @ layers[0][0].T + layers[0][1]) @ linear.weight.T + linear.bias
    mean, variance = moments(inner, (0,))
    scale = second.weight / (variance + second.eps).sqrt()
    layers.append((scale[:, None] * linear.weight, scale * (linear.bias - mean) + second.bias))
    return [*layers, (last.weight, last.bias)]


def moments(values: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean = values.mean(over)
    return mean, (values**2).mean(over) - mean**2


def logits_of(x: Tensor, layers: list[Dense]) -> Tensor:
    for weight, bias in layers[:-1]:
        x = F.relu(x @ weight.T + bias)
    return x @ layers[-1][0].T + layers[-1][1]


def ends(lower: Tensor, upper: Tensor, layer: Dense) -> tuple[Tensor, Tensor]:
    plus, minus = layer[0].clamp(min=0).T, layer[0].clamp(max=0).T
    return lower @ plus + upper @ minus + layer[1], upper @ plus + lower @ minus + layer[1]


def hidden(lower: Tensor, upper: Tensor, layers: list[Dense], shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Ends behind the ReLU of each of ``layers``."""
    for layer in layers:
        lower, upper = ends(lower, upper, layer)
        upper = torch.where((lower < 0) & (upper > 0), shrink * upper, upper)
        lower, upper = F.relu(lower), F.relu(upper)
    return lower, upper


def rows_of(labels: Tensor, classes: int = 5) -> Tensor:
    rows = [[torch.eye(classes)[y] - torch.eye(classes)[j] for j in range(classes) if j != y] for y in labels.tolist()]
    return torch.stack([torch.stack(own) for own in rows]).double()


def margins_below(lower: Tensor, upper: Tensor, last: Dense, labels: Tensor) -> Tensor:
    merged, constant = rows_of(labels) @ last[0], rows_of(labels) @ last[1]
    return (merged.clamp(min=0) @ lower[:, :, None] + merged.clamp(max=0) @ upper[:, :, None]).squeeze(2) + constant


def cross_entropy(margins: Tensor) -> Tensor:
    return (1 + torch.exp(-margins).sum(1)).log().mean()


class Case:
    """One step: what every oracle starts from."""

    kappa = 0.3

    def __init__(self):
        self.model, self.batch, self.step = make_model(), make_batch(), make_step()
        assert isinstance(self.model, nn.Sequential)
        torch.manual_seed(4)
        for norm in (self.model[1], self.model[5]):
            assert isinstance(norm.weight, nn.Parameter)
            nn.init.normal_(norm.weight, 1.0, 0.5)
        self.pixels, self.labels = self.batch.images.flatten(1), self.batch.labels
        self.lower, self.upper = (self.pixels - 0.05).clamp(min=0), (self.pixels + 0.05).clamp(max=1)
        self.layers = dense_layers(self.model, self.batch.images)

    def total(self, robust: Tensor) -> Tensor:
        clean = F.cross_entropy(logits_of(self.pixels, self.layers), self.labels)
        return self.kappa * clean + (1 - self.kappa) * robust

    def slope(self, total: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(self.model.parameters()))])

    def agrees(self, loss, robust: Tensor, surrogate: Tensor | None = None):
        """``surrogate`` has the gradient that the loss is to have, where it is not that of ``robust``."""
        expected = self.slope(self.total(robust if surrogate is None else surrogate))
        terms, found = gradient(make_like(self.model), loss, self.batch, self.step)
        torch.testing.assert_close(terms.total, self.total(robust), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)

    def attacked(self, steps: int, size: float, restarts: int) -> Tensor:
        layers = [(weight.detach(), bias.detach()) for weight, bias in self.layers]
        best, worst = self.pixels, torch.full((len(self.pixels),), -torch.inf).double()
        for restart in range(restarts):
            share = self.step.noise.uniform((1, 8, 8), f"start/{restart}", torch.float64).flatten(1)
            x = self.lower + share * (self.upper - self.lower)
            for _ in range(steps + 1):
                x = x.detach().requires_grad_()
                value = F.cross_entropy(logits_of(x, layers), self.labels, reduction="none")
                better = value.detach() > worst
                best, worst = torch.where(better[:, None], x.detach(), best), torch.where(better, value.detach(), worst)
                (up,) = torch.autograd.grad(value.sum(), x)
                moved = x.detach() + size * (self.upper - self.lower) / 2 * up.sign()
                x = torch.minimum(torch.maximum(moved, self.lower), self.upper)
        return best

    def small(self, images: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        half = tau * (self.upper - self.lower) / 2
        center = torch.minimum(torch.maximum(images, self.lower + half), self.upper - half)
        return center - half, center + half


def make_like(model):
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    return twin


def test_ibp():
    case = Case()
    verified = margins_below(*hidden(case.lower, case.upper, case.layers[:2]), case.layers[2], case.labels)
    case.agrees(Ibp(kappa=0.3), cross_entropy(verified))


@pytest.mark.parametrize(("tau", "shrink"), [(0.1, 0.8), (0.4, 1.0), (0.9, 0.8)])
def test_sabr(tau, shrink):
    case = Case()
    box = case.small(case.attacked(3, 0.4, 2), tau)
    verified = margins_below(*hidden(*box, case.layers[:2], shrink), case.layers[2], case.labels)
    attack = Pgd(steps=3, step_size=0.4, restarts=2, attack_mode="clean")
    case.agrees(Sabr(kappa=0.3, tau=tau, shrink=shrink, bn_mode="clean", attack=attack), cross_entropy(verified))


def found_points(case: Case, lower: Tensor, upper: Tensor, steps: int, restarts: int) -> Tensor:
    """(B, 4, 64): by sign steps of max(0.2, 2 / steps) of the width, a fifth of that from 0.7 of 10 or more on."""
    layers = [(weight.detach(), bias.detach()) for weight, bias in case.layers[1:]]
    low, high = lower.detach(), upper.detach()
    points = low[:, None].repeat(1, 4, 1)
    for place in range(4):
        least = torch.full((len(low),), torch.inf).double()
        for restart in range(restarts):
            share = case.step.noise.uniform((4, 4, 4, 4), f"features/{restart}", torch.float64)[:, place].flatten(1)
            x = low + share * (high - low)
            for number in range(steps + 1):
                x = x.detach().requires_grad_()
                margin = (rows_of(case.labels)[:, place] * logits_of(x, layers)).sum(1)
                less = margin.detach() < least
                points[:, place] = torch.where(less[:, None], x.detach(), points[:, place])
                least = torch.where(less, margin.detach(), least)
                (slope,) = torch.autograd.grad(margin.sum(), x)
                size = max(0.2, 2 / steps) * (0.2 if steps >= 10 and number >= int(0.7 * steps) else 1)
                x = torch.minimum(torch.maximum(x.detach() - size * (high - low) * slope.sign(), low), high)
    return points


def taps(case: Case, box: tuple[Tensor, Tensor], steps: int, restarts: int, scale: float, threshold: float, shrink):
    """(the loss, a surrogate with its gradient)."""
    lower, upper = hidden(*box, case.layers[:1], shrink)
    points = found_points(case, lower, upper, steps, restarts).requires_grad_()
    margins = torch.stack([(rows_of(case.labels)[:, j] * logits_of(points[:, j], case.layers[1:])).sum(1)
                           for j in range(4)], 1)  # fmt: skip
    estimate = cross_entropy(margins)
    verified = margins_below(*hidden(lower, upper, case.layers[1:2], shrink), case.layers[2], case.labels)
    bound = cross_entropy(verified)
    (pull,) = torch.autograd.grad(estimate, points, retain_graph=True)
    low, high, at = lower.detach()[:, None], upper.detach()[:, None], points.detach()
    reach = threshold * (high - low)
    shares = [torch.where(reach == 0, 0.5, ((reach - away) / reach).clamp(0, 1)) for away in (at - low, high - at)]
    linked = (pull * (shares[0] * lower[:, None] + shares[1] * upper[:, None])).sum()
    surrogate = scale * bound.detach() * (estimate + linked) + estimate.detach() * bound
    return estimate * bound, surrogate


@pytest.mark.parametrize(("steps", "restarts"), [(1, 1), (4, 2), (12, 1)])
@pytest.mark.parametrize(("scale", "threshold", "shrink"), [(1.0, 0.5, 1.0), (4.0, 0.3, 0.8)])
def test_taps(steps, restarts, scale, threshold, shrink):
    case = Case()
    found = taps(case, (case.lower, case.upper), steps, restarts, scale, threshold, shrink)
    loss = Taps(kappa=0.3, gradient_scale=scale, threshold=threshold, latent_steps=steps, latent_restarts=restarts,
                shrink=shrink)  # fmt: skip
    case.agrees(loss, *found)


def test_staps():
    case = Case()
    box = case.small(case.attacked(2, 0.5, 2), 0.4)
    loss = Staps(kappa=0.3, tau=0.4, latent_steps=3, latent_restarts=2, shrink=0.8,
                 attack=Pgd(steps=2, step_size=0.5, restarts=2, attack_mode="clean"))  # fmt: skip
    case.agrees(loss, *taps(case, box, 3, 2, 4.0, 0.5, 0.8))


def carried_back(case: Case, forms: Tensor) -> Tensor:
    """(B, R) lower bounds of forms (B, R, 5) of the logits: one backward pass over interval bounds."""
    below = [ends(case.lower, case.upper, case.layers[0])]
    below.append(ends(F.relu(below[0][0]), F.relu(below[0][1]), case.layers[1]))
    constant = forms @ case.layers[2][1]
    forms = forms @ case.layers[2][0]
    for (low, high), (weight, bias) in zip(reversed(below), reversed(case.layers[:2]), strict=True):
        low, high = low[:, None], high[:, None]
        open_ = (low < 0) & (high > 0)
        above = torch.where(open_, high / torch.where(open_, high - low, 1), (low >= 0).double())
        under = torch.where(open_, (high >= -low).double(), (low >= 0).double())
        lifted = torch.where(open_, -low * above, 0)
        constant = constant + (forms.clamp(max=0) * lifted).sum(2)
        forms = forms.clamp(min=0) * under + forms.clamp(max=0) * above
        constant, forms = constant + forms @ bias, forms @ weight
    lower, upper = case.lower[:, :, None], case.upper[:, :, None]
    return (forms.clamp(min=0) @ lower + forms.clamp(max=0) @ upper).squeeze(2) + constant


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_crown_ibp(beta):
    case = Case()
    verified = margins_below(*hidden(case.lower, case.upper, case.layers[:2]), case.layers[2], case.labels)
    linear = carried_back(case, rows_of(case.labels))
    case.agrees(CrownIbp(kappa=0.3, beta=beta), cross_entropy(beta * linear + (1 - beta) * verified))


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_crown_ibp_with_its_loss_fused(beta):
    """log(1 + the largest sum of chords of e^(-z)), each over the interval of its margin."""
    case = Case()
    rows = rows_of(case.labels)
    lower, upper = hidden(case.lower, case.upper, case.layers[:2])
    a = margins_below(lower, upper, case.layers[2], case.labels)
    b = -margins_below(lower, upper, (-case.layers[2][0], -case.layers[2][1]), case.labels)
    slopes = (torch.exp(-b) - torch.exp(-a)) / (b - a)
    largest = (torch.exp(-a) - slopes * a).sum(1) - carried_back(case, -(slopes[:, :, None] * rows).sum(1, True))[:, 0]
    fused = (1 + largest).log().mean()
    case.agrees(CrownIbp(kappa=0.3, beta=beta, fusion=True), beta * fused + (1 - beta) * cross_entropy(a))
