"""Fields that recipes need to follow their sources: values by formula, bad ones refused, runs begun without them."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from certtrain.attacks import Transferred
from certtrain.bounds import Interval, LinfBall, SparseBall
from certtrain.config import added, stable_mapping, structure, unstructure
from certtrain.data import Augment
from certtrain.errors import FieldError, InputError
from certtrain.losses import CcIbp, Loss, Sabr, Trades
from certtrain.losses.sabr import box_of_radius, small_box
from certtrain.models import HE, Architecture, CifarResNet, PreActResNet, SmallCnn, initialise_he
from certtrain.noise import Noise
from certtrain.step import Batch, State, Step
from certtrain.training.rates import Cycle


@pytest.mark.parametrize(
    ("kind", "section", "message"),
    [
        (Architecture, {"type": "PreActResNet", "shortcut": "output"}, r"model\.shortcut: found 'output'; accepted: "),
        (Architecture, {"type": "CifarResNet", "branch_activation": 3}, r"model\.branch_activation: "),
        (
            Loss,
            {"type": "Trades", "statistics": ["clean", "noise"]},
            r"model\.statistics: found .*'noise'.*; accepted: a list ",
        ),
        (Loss, {"type": "Trades", "statistics": "clean"}, r"model\.statistics"),
        (Loss, {"type": "Sabr", "half_width": "tau"}, r"model\.half_width: found 'tau'; accepted: "),
        (Cycle, {"epochs": [0], "shares": [1], "curve": "sine"}, r"model\.curve: found 'sine'; accepted: "),
        (
            Loss,
            {"type": "Atta", "attack": {"type": "Transferred", "early": 10}},
            r"early: found 10; accepted: .* 0 to 9",
        ),
        (
            Loss,
            {"type": "CcIbp", "adversarial": {"type": "Trades", "statistics": ["clean"]}},
            r"adversarial\.statistics: found .*; accepted: an empty list",
        ),
    ],
)
def test_bad_values(kind, section, message):
    with pytest.raises(InputError, match=message):
        structure(kind, section, "model")


def test_the_mirror_needs_images_wider_than_its_pad():
    with pytest.raises(InputError, match=r"augment\.pad: found 4 for the mirror of images of 4×9; accepted: at most 3"):
        Augment(pad=4, padding="mirror").check_shape((1, 4, 9))
    Augment(pad=3, padding="mirror").check_shape((1, 4, 9))
    Augment(pad=4).check_shape((1, 4, 9))


@dataclass(frozen=True)
class Older:
    rate: float = 0.5
    steps: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Newer:
    rate: float = 0.5
    steps: tuple[int, ...] = (1, 2)
    more: str = added("none")


@dataclass(frozen=True)
class Holder:
    inner: Any = field(default_factory=Newer)


def test_an_added_field_shows_where_it_is_used():
    """Checkpoints of runs that were begun before it are still those of the recipe."""
    assert stable_mapping(Newer()) == unstructure(Older()) == {"rate": 0.5, "steps": [1, 2]}
    assert stable_mapping(Holder()) == unstructure(Holder(Older()))
    assert stable_mapping(Newer(more="some")) == unstructure(Newer(more="some"))
    assert unstructure(Newer())["more"] == "none"
    for value in (Trades(), Sabr(), Transferred(), Cycle((0,), (1,))):
        names = {f.name for f in dataclasses.fields(value) if "added" in f.metadata}
        assert names and not names & stable_mapping(value).keys()


@pytest.mark.parametrize("name", HE)
def test_draws_of_released_networks(name):
    """Deviations by the formulas of each; what keeps torch's draw is bounded as a uniform number is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(6400, 50))
    initialise_he(model, HE[name])
    conv, norm, linear = model[0], model[1], model[3]
    assert isinstance(conv, nn.Conv2d) and isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm2d)
    fan = 9 * (8 if name == "he_fan_in_zero_linear" else 64)
    assert float(conv.weight.std().detach()) == pytest.approx(math.sqrt(2 / fan), rel=0.05)
    assert float(conv.weight.abs().max().detach()) > 3 * math.sqrt(2 / fan)
    wanted = {"he_fan_in_zero_linear": 0.0, "he_fan_out_linear": math.sqrt(2 / 6400)}
    assert float(linear.weight.std().detach()) == pytest.approx(wanted.get(name, 1 / math.sqrt(3 * 6400)), rel=0.01)
    assert bool(linear.bias.any()) == (name == "he_fan_out") and conv.bias is not None
    assert bool(conv.bias.any()) == (name == "he_fan_out")
    assert bool((norm.weight == 1).all()) and not norm.bias.any()


def test_half_a_cosine():
    """Flat at both ends, the mean in the middle, momentum along with the rate."""
    cycle = Cycle((0, 2, 10), (0.5, 1, 0), (0.9, 0.8, 0.9), curve="cosine")
    assert [cycle.share(epoch) for epoch in (0, 1, 2, 6, 10, 11)] == pytest.approx([0.5, 0.75, 1, 0.5, 0, 0])
    assert cycle.share(4) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert cycle.momentum_at(1) == pytest.approx(0.85) and cycle.momentum_at(4) == pytest.approx(
        0.9 - 0.1 * cycle.share(4)
    )


def test_the_last_activation_of_a_branch_and_the_last_norm():
    """NuAT's block never adds anything negative; GradAlign's net averages sums of blocks as they are."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    for active in (False, True):
        block = CifarResNet(width=4, branch_activation=active).block(4, 4, 1)
        assert bool((block.branch(x) < 0).any()) != active  # type: ignore[operator]
    bare = PreActResNet(width=2, last_norm=False).build((3, 8, 8), 4)
    whole = PreActResNet(width=2).build((3, 8, 8), 4)
    assert [type(layer).__name__ for layer in bare.children()][-4:] == [
        "PreActivated",
        "AdaptiveAvgPool2d",
        "Flatten",
        "Linear",
    ]
    assert sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in bare.parameters()) == 2 * 16


# --- SABR's half width


def boxes(tau: float, epsilon: float) -> tuple[torch.Tensor, Interval, torch.Tensor, Interval]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 40, generator=generator, dtype=torch.float64).round(decimals=2)
    images[:, ::2] = images[:, ::2].round()  # half of them black or white
    hull = Interval.box(images, epsilon)
    points = hull.lower + torch.rand(50, 40, generator=generator, dtype=torch.float64) * 2 * hull.radius
    return images, hull, points, box_of_radius(hull, points, tau * epsilon)


@pytest.mark.parametrize("tau", [0.1, 0.4, 0.7, 1.0])
def test_a_constant_half_width_by_the_formula_of_the_sources(tau):
    """eth-sri/SABR 1a6c258, expressive-losses 3df64fa: the point, held between lower + tau ε and then upper - tau ε,
    plus and minus tau ε, cut to [0, 1]. Inside the set up to one half; above, it leaves it below alone."""
    epsilon = 0.2
    _, hull, points, box = boxes(tau, epsilon)
    for i in range(50):
        for j in range(40):
            low, high = float(hull.lower[i, j]), float(hull.upper[i, j])
            center = min(max(float(points[i, j]), low + tau * epsilon), high - tau * epsilon)
            ends = max(center - tau * epsilon, 0.0), min(center + tau * epsilon, 1.0)
            assert (float(box.lower[i, j]), float(box.upper[i, j])) == pytest.approx(ends, abs=1e-12)
    assert bool((box.upper <= hull.upper + 1e-12).all())
    assert bool((box.lower >= hull.lower - 1e-12).all()) == (tau <= 0.5)
    assert bool((box.lower >= hull.lower - max(2 * tau - 1, 0) * epsilon - 1e-12).all())


def test_the_two_half_widths_agree_where_nothing_is_cut():
    images, hull, points, box = boxes(0.3, 0.1)
    inner = (images >= 0.1) & (images <= 0.9)
    other = small_box(hull, points, 0.3)
    assert torch.allclose(box.lower[inner], other.lower[inner]) and torch.allclose(box.upper[inner], other.upper[inner])
    assert bool((box.radius[images == 0] > 1.9 * other.radius[images == 0]).all())  # half of the set is left there


def test_half_widths_of_a_step():
    """The loss over the wider boxes is larger; a set whose size is no radius is refused."""
    torch.manual_seed(0)
    model = SmallCnn(width=2, hidden=8).build((1, 8, 8), 4).train()
    images, index = torch.rand(6, 1, 8, 8).round(), torch.arange(6)
    epsilon = torch.tensor(0.1)
    step = Step(LinfBall(epsilon), epsilon, epsilon, 0.5, Noise(0, index), State({}, {}))  # type: ignore[arg-type]
    narrow, wide = (
        Sabr(half_width=kind)(model, Batch(images, index % 4, index), step) for kind in ("clipped", "epsilon")
    )
    assert float(wide.total.detach()) > float(narrow.total.detach())
    with pytest.raises(InputError, match=r"loss\.half_width: found epsilon for a SparseBall, .*; accepted: clipped"):
        Sabr(half_width="epsilon", attack=None).check_ball(SparseBall(2))
    Sabr(half_width="epsilon").check_ball(LinfBall(0.1))


def test_early_fresh_starts():
    """Counted from 1, ATTA's code begins anew with epochs 10, 20 and 30 (hzzheng93/ATTA 2c987de), and with 1."""
    images, index = torch.full((2, 1, 4, 4), 0.5), torch.arange(2)

    def fresh(attack: Transferred) -> list[int]:
        specs = attack.declare_state((1, 4, 4), 3)
        state = State({key: spec.allocate(2, 2, torch.device("cpu")) for key, spec in specs.items()}, specs)
        found, ball = [], LinfBall(0.1)
        for epoch in range(38):
            batch = Batch(images, index, index)
            state.write("transferred", batch, torch.full((2, 1, 4, 4), 0.05))
            step = Step(ball, torch.tensor(0.1), torch.tensor(0.1), 0.0, Noise(epoch, index), state, epoch=epoch)
            start = attack.begin(batch, ball, step)
            found += [epoch + 1] if float((start - images).abs().max()) < 0.01 else []
        return found

    assert fresh(Transferred(early=1)) == [1, 10, 20, 30]
    assert fresh(Transferred()) == [1, 11, 21, 31]


def test_certified_losses_refuse_an_order_of_passes():
    with pytest.raises(FieldError, match=r"adversarial\.statistics"):
        CcIbp(adversarial=Trades(statistics=("clean", "adversarial")))
    CcIbp(adversarial=Trades())
